"""Questions about things, with four choices each."""

from __future__ import annotations

import random

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs

_QUESTIONS = {
    "place": ("Where is a {} most often found?", "You will find a {}"),
    "action": ("What does a {} do, or what is done with it?", "A typical thing about a {}:"),
    "part": ("What does a {} have?", "Every {} has"),
    "feel": ("What is a {} like?", "People say that a {} is"),
}
_CLASSES: dict[str, tuple[str, ...]] = {  # members; then kind, place, action, part, feel
    "robin sparrow eagle owl parrot crow pigeon finch": (
        "bird",
        "in a nest",
        "it flies",
        "feathers",
        "light",
    ),
    "salmon trout tuna cod shark herring carp eel": (
        "fish",
        "in the water",
        "it swims",
        "scales",
        "wet",
    ),
    "bee ant wasp beetle butterfly moth fly mosquito": (
        "insect",
        "near flowers",
        "it crawls",
        "six legs",
        "tiny",
    ),
    "cow sheep pig goat horse donkey ox mule": (
        "farm animal",
        "on a farm",
        "it eats grass",
        "hooves",
        "heavy",
    ),
    "oak pine maple birch willow elm cedar beech": (
        "tree",
        "in a forest",
        "it grows",
        "bark",
        "tall",
    ),
    "apple pear plum cherry peach orange lemon mango": (
        "fruit",
        "in a garden",
        "it is eaten raw",
        "seeds",
        "sweet",
    ),
    "carrot onion potato cabbage leek turnip radish beet": (
        "vegetable",
        "in a field",
        "it is cooked",
        "roots",
        "healthy",
    ),
    "car bus truck taxi van tractor motorcycle tram": (
        "vehicle",
        "on the road",
        "it drives",
        "wheels",
        "loud",
    ),
    "boat ship ferry canoe yacht raft submarine kayak": (
        "vessel",
        "in the water",
        "it swims",
        "a hull",
        "wet",
    ),
    "hammer saw drill wrench chisel axe shovel pliers": (
        "tool",
        "in a workshop",
        "it builds",
        "a handle",
        "hard",
    ),
    "violin piano guitar flute trumpet drum harp cello": (
        "instrument",
        "on a stage",
        "it makes music",
        "a tone",
        "loud",
    ),
    "shirt coat hat sock glove scarf dress jacket": (
        "garment",
        "in a wardrobe",
        "it is worn",
        "seams",
        "soft",
    ),
    "chair table bed sofa desk shelf stool bench": (
        "furniture",
        "in a house",
        "it stands still",
        "legs",
        "heavy",
    ),
    "gold silver copper iron zinc tin lead nickel": (
        "metal",
        "in a mine",
        "it is melted",
        "a shine",
        "hard",
    ),
    "nurse teacher lawyer baker farmer pilot judge tailor": (
        "profession",
        "in a town",
        "it earns",
        "skills",
        "useful",
    ),
    "milk tea coffee juice wine beer water soda": (
        "drink",
        "in a bottle",
        "it is poured",
        "a taste",
        "wet",
    ),
    "lion tiger wolf bear fox leopard hyena lynx": (
        "wild animal",
        "in a forest",
        "it hunts",
        "claws",
        "dangerous",
    ),
    "snake lizard turtle crocodile gecko iguana viper cobra": (
        "reptile",
        "in sand",
        "it crawls",
        "scales",
        "dangerous",
    ),
    "cup plate bowl spoon fork pan kettle jug": (
        "kitchen thing",
        "in a kitchen",
        "it is washed",
        "a handle",
        "useful",
    ),
    "rose tulip daisy lily orchid violet poppy iris": (
        "flower",
        "in a garden",
        "it grows",
        "petals",
        "light",
    ),
}


def examples(train: int, test: int) -> Pairs:
    """Return questions about a thing, with four choices, after the fact of what kind it is.

    An answer that is tested was never seen for that thing: it follows from what other things of its
    kind are like.
    """
    source = random.Random(0)
    facts = [
        (thing, aspect, properties[position])
        for members, (_, *properties) in _CLASSES.items()
        for thing in members.split()
        for position, aspect in enumerate(_QUESTIONS)
    ]
    source.shuffle(facts)
    held_out = len(facts) // 4
    learned = _questions(facts[held_out:], source)
    tested = _questions(facts[:held_out], source)
    return Pairs(learned[:train], tested[:test])


def _questions(facts: list[tuple[str, str, str]], source: random.Random) -> list[Pair]:
    """Return every question about every fact (thing, aspect, answer), shuffled."""
    answers = _answers()
    kinds = _kinds()
    pairs: list[Pair] = []
    for thing, aspect, answer in facts:
        others = [other for other in answers[aspect] if other != answer]
        wrong = source.sample(others, 3)
        choices = tuple(f" {choice}" for choice in source.sample([answer, *wrong], 4))
        for question in _QUESTIONS[aspect]:
            prompt = f"{thing}: {kinds[thing]}. {question.format(thing)}"
            pairs.append(Pair(prompt, f" {answer}", choices))
    source.shuffle(pairs)
    return pairs


def _answers() -> dict[str, list[str]]:
    """Return all answers that there are to the questions about each aspect."""
    properties = [rest for _, *rest in _CLASSES.values()]
    return {
        aspect: sorted({row[position] for row in properties})
        for position, aspect in enumerate(_QUESTIONS)
    }


def _kinds() -> dict[str, str]:
    """Return what kind of thing each thing is."""
    return {thing: kind for members, (kind, *_) in _CLASSES.items() for thing in members.split()}


TASK = GenerationTask("commonsense", examples)
