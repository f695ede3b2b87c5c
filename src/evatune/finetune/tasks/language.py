"""Prompts with answers for the small language model: word problems, questions about things, code,
reviews.

All of it is made from a seed, or comes with Python or the package index. The pre-training of the
small model (scripts/pretrain/llama_small.py) sees none of it: it leaves out the modules of
`held_out`, and the texts.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from evatune.loading.corpora import ratings


@dataclass(frozen=True)
class Pair:
    """A prompt and the answer to learn. `choices` are all answers to weigh, where there are given
    ones."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """What a task learns from and is tested on; no prompt is in both."""

    train: list[Pair]
    test: list[Pair]


# --- Arithmetic word problems ---------------------------------------------------------------------

_NAMES = (
    "Ann",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
)
_THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cakes",
    "pens",
    "stones",
    "tickets",
    "eggs",
    "stamps",
    "balls",
    "letters",
)
_SUBTRACT = ("gives {b} to {other}", "loses {b}", "sells {b}", "throws {b} away")
_ADD = ("buys {b} more", "finds {b} more", "gets {b} from {other}", "takes {b} more")


def _problem(source: random.Random) -> Pair:
    """One addition or subtraction, or groups of equal size."""
    name, other = source.sample(_NAMES, 2)
    thing = source.choice(_THINGS)
    if source.random() < 0.25:
        a, b, sign = source.randint(2, 9), source.randint(2, 9), "*"
        story = f"{name} has {a} boxes of {b} {thing}"
    else:
        a, b, sign = source.randint(11, 30), source.randint(1, 9), source.choice("+-")
        step = source.choice(_ADD if sign == "+" else _SUBTRACT).format(b=b, other=other)
        story = f"{name} has {a} {thing}, {step}"
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return Pair(f"{story}. How many {thing} now?\n", f"{a} {sign} {b} = {result}")


def final_answer(text: str) -> str:
    """What a solution says its answer is; empty if it says none."""
    lines = text.strip().splitlines()
    return lines[0].rpartition("=")[2].strip(" .") if lines and "=" in lines[0] else ""


def arithmetic(train: int, test: int) -> Pairs:
    """Word problems with worked solutions."""
    source = random.Random(0)
    found: dict[str, Pair] = {}
    # there are a hundred thousand; a repeated one is drawn now and then
    while len(found) < train + test:
        pair = _problem(source)
        found[pair.prompt] = pair
    pairs = list(found.values())
    return Pairs(pairs[:train], pairs[train:])


# --- Questions about things -----------------------------------------------------------------------

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


def commonsense(train: int, test: int) -> Pairs:
    """Questions about a thing, with four choices, after the fact of what kind it is.

    An answer that is tested was never seen for that thing: it follows from what other things of its
    kind are like.
    """
    source = random.Random(0)
    kinds = list(_QUESTIONS)
    answers = {
        kind: sorted({facts[place] for _, *facts in _CLASSES.values()})
        for place, kind in enumerate(kinds)
    }
    runs = [
        (thing, kind, facts[place])
        for members, (_, *facts) in _CLASSES.items()
        for thing in members.split()
        for place, kind in enumerate(kinds)
    ]
    of = {thing: facts[0] for members, facts in _CLASSES.items() for thing in members.split()}
    source.shuffle(runs)
    held = len(runs) // 4

    def pairs(some: list[tuple[str, str, str]]) -> list[Pair]:
        found: list[Pair] = []
        for thing, kind, answer in some:
            wrong = source.sample([other for other in answers[kind] if other != answer], 3)
            choices = source.sample([answer, *wrong], 4)
            found.extend(
                Pair(
                    f"{thing}: {of[thing]}. {question.format(thing)}",
                    f" {answer}",
                    tuple(f" {one}" for one in choices),
                )
                for question in _QUESTIONS[kind]
            )
        source.shuffle(found)
        return found

    return Pairs(pairs(runs[held:])[:train], pairs(runs[:held])[:test])


# --- Code -----------------------------------------------------------------------------------------

_NOT_SOURCE = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "idle_test",
    "turtledemo",
    "__pycache__",
    "encodings",
}
_LONGEST = 240  # characters of a body that is kept


def held_out(module: str) -> bool:
    """Whether a top-level module of the standard library is kept for fine-tuning; a quarter of them
    is."""
    return zlib.crc32(module.encode()) % 4 == 3


def library() -> Iterator[tuple[str, str]]:
    """The standard library's own modules in a fixed order: top-level name, source."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _NOT_SOURCE & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            yield parts[0].removesuffix(".py"), path.read_text(encoding="utf-8", errors="replace")


@cache
def _functions() -> dict[str, list[Pair]]:
    """Documented functions of the held-out modules: head and first line of the docstring → the
    body's first statements."""
    found: dict[str, list[Pair]] = {}
    for module, text in library():
        # Some versions of Python keep datetime's and decimal's code in modules named so, and
        # pre-training saw it elsewhere.
        if not held_out(module) or module.startswith("_py"):
            continue
        rows = text.split("\n")  # not splitlines, which counts form feeds too
        for node in ast.walk(ast.parse(text)):
            if (
                not isinstance(node, ast.FunctionDef)
                or len(node.body) < 2
                or not ast.get_docstring(node)
            ):
                continue
            line = (ast.get_docstring(node) or "").splitlines()[0]
            # Not ast.get_source_segment, which splits the whole text each time.
            body = ["\n".join(rows[one.lineno - 1 : one.end_lineno]) for one in node.body[1:]]
            kept = textwrap.dedent(body[0])
            for more in body[1:]:
                if len(kept) + len(more) > _LONGEST:
                    break
                kept += "\n" + textwrap.dedent(more)
            if kept and len(kept) <= _LONGEST:
                head = f"def {node.name}({ast.unparse(node.args)}):\n"
                found.setdefault(module, []).append(
                    Pair(head + f'    """{line}"""\n', textwrap.indent(kept, "    "))
                )
    return found


def code(train: int, test: int) -> Pairs:
    """Bodies of documented functions of the standard library; no module is in both parts."""
    functions = _functions()
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for module, pairs in functions.items():
        parts[zlib.crc32(module.encode()) % 8 == 7].extend(pairs)
    for part in parts:
        random.Random(0).shuffle(part)
    known = {pair.prompt for pair in parts[0]}
    return Pairs(parts[0][:train], [pair for pair in parts[1] if pair.prompt not in known][:test])


# --- Reviews --------------------------------------------------------------------------------------


def reviews(train: int, test: int) -> Pairs:
    """Film review snippets, learned as plain text."""
    texts = list(dict.fromkeys(text for text, _ in ratings("movie")))
    random.Random(0).shuffle(texts)
    return Pairs(
        [Pair("", text) for text in texts[:train]],
        [Pair("", text) for text in texts[train : train + test]],
    )


TASKS: dict[str, Callable[[int, int], Pairs]] = {
    "arithmetic": arithmetic,
    "commonsense": commonsense,
    "code": code,
    "reviews": reviews,
}
