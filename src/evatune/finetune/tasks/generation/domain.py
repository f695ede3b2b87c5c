"""Language generation: answers to prompts, scored by what a model writes or finds likely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from evatune.errors import ConfigError, DataError
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.base import DataSource, Domain, ModelKind, Part, Task, by_length
from evatune.finetune.tasks.generation import mathematics, question_sets, reviews
from evatune.finetune.tasks.generation.base import Pair
from evatune.finetune.tasks.generation.hub_sets import HubSets, set_sources
from evatune.finetune.tasks.generation.scoring import (
    measures,
    scored_measures,
    share_chosen,
    share_of_tokens,
    token_losses,
)
from evatune.finetune.tasks.generation.tasks import TASKS
from evatune.finetune.tasks.pretrained import load_pretrained
from evatune.finetune.tasks.splits import Split
from evatune.finetune.tasks.user_data import (
    describe_parts,
    load_examples,
    own_origin,
    own_sources,
    require_task,
)
from evatune.loading import corpora
from evatune.loading.assets import asset
from evatune.loading.chats import load_template, require_template
from evatune.loading.columns import find_records
from evatune.loading.encoding import Encoder, Row, encode_answer
from evatune.loading.records import Records
from evatune.utils.extras import require

_OFFLINE = "generation-code"
_INSTEAD = (
    "a local folder with config.json, weights and tokenizer, or model=demo as in the recipe"
    f" {_OFFLINE}"
)


def prepare(recipe: Recipe, max_examples: int | None = None) -> Task:
    """Load everything a run needs. The examples depend on the sizes alone, not on the run's seed.

    The loss counts the answer's tokens only. The score is, by task: the share of an answer's
    tokens that are right after the right ones before them, where there is one right answer
    (arithmetic, dates, numbers, clock); of questions whose right choice is the most likely one, as
    a sum over its tokens (commonsense); else one over the perplexity per character, so that models
    with other tokenizers can be compared.

    Args:
        max_examples: examples of each part, and of each of several tests, that are encoded.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where model or data
    cannot be had.
    """
    if recipe.task == question_sets.TASK:
        return _of_question_sets(recipe, max_examples)
    if recipe.task == mathematics.TASK:
        return _of_mathematics(recipe, max_examples)
    if recipe.data.source is not None:
        return _of_the_user(recipe, max_examples)
    pairs = _bundled_pairs(recipe).map(lambda part: part[:max_examples])
    model, tokenizer = load_model(recipe)
    task = _task(model, tokenizer, _encoded(pairs, tokenizer, recipe.data.max_length))
    evaluate = _evaluation(recipe, tokenizer, pairs)
    if evaluate is not None:
        return replace(task, metric=measures, evaluate=evaluate, score_name="accuracy")
    if TASKS[recipe.task].one_right:
        share = "mean share of an answer's tokens that are right"
        return replace(task, metric=share_of_tokens, score_name=share)
    return task


def _of_question_sets(recipe: Recipe, max_examples: int | None) -> Task:
    """Return the task of eight sets of questions, scored by the mean over their accuracies."""
    sets = question_sets.question_sets(recipe.data).first(max_examples)
    model, tokenizer = load_model(recipe)
    longest, size = recipe.data.max_length, recipe.evaluation_batch

    def shares(model: Any, part: Part, _: Path) -> dict[str, float]:
        parts = {"all": sets.validation} if part == "validation" else sets.tests
        return _with_mean(
            {
                name: share_chosen(model, tokenizer, pairs, longest, size)
                for name, pairs in parts.items()
            }
        )

    name = "accuracy, mean over eight sets"
    task = _of_hub_sets(sets, model, tokenizer, longest)
    return replace(task, metric=measures, evaluate=shares, score_name=name)


def _of_mathematics(recipe: Recipe, max_examples: int | None) -> Task:
    """Return the task of mathematical problems, scored by the mean share solved of two tests.

    Validation is scored by how likely its answers are.
    """
    require("eval", "the test of mathematics")
    sets = mathematics.mathematics(recipe.data).first(max_examples)
    model, tokenizer = load_model(recipe)
    size = recipe.evaluation_batch

    def shares(model: Any, part: Part, folder: Path) -> dict[str, float]:
        if part == "validation":
            return {}
        return _with_mean(
            {
                name: mathematics.share_solved(
                    model, tokenizer, problems, size, folder / f"answers-{name}.jsonl"
                )
                for name, problems in sets.tests.items()
            }
        )

    name = "mean share of GSM8K and of MATH solved"
    task = _of_hub_sets(sets, model, tokenizer, recipe.data.max_length)
    return replace(task, evaluate=shares, score_name=name)


def _of_hub_sets(sets: HubSets, model: Any, tokenizer: Any, longest: int) -> Task:
    """Return the task of several tests, each still to be scored."""
    tested = [pair for pairs in sets.tests.values() for pair in pairs]
    pairs = Split(sets.train, sets.validation, tested)
    longest = min(longest, _positions(model, tokenizer))
    return _task(model, tokenizer, _encoded(pairs, tokenizer, longest))


def _positions(model: Any, tokenizer: Any) -> int:
    """Return how many tokens the model can read at once."""
    positions = getattr(model.config, "max_position_embeddings", None)
    known: int = tokenizer.model_max_length
    return known if positions is None else min(positions, known)


def _with_mean(shares: dict[str, float]) -> dict[str, float]:
    """Return the shares by test, and their mean as the score."""
    return {"score": sum(shares.values()) / len(shares), **shares}


def _encoded(pairs: Split[list[Pair]], tokenizer: Any, longest: int) -> Split[list[Row]]:
    """Return the tokens of prompts and answers."""
    return pairs.map(
        lambda part: [encode_answer(tokenizer, pair.prompt, pair.answer, longest) for pair in part]
    )


def _of_the_user(recipe: Recipe, max_examples: int | None) -> Task:
    """Return the task of `data.source`: to answer as it does, or to write such texts."""
    data = recipe.data
    template = None if data.chat_template is None else load_template(data.chat_template)
    records = _user_records(recipe)
    model, tokenizer = load_model(recipe)
    if template is not None:
        tokenizer.chat_template = template
    train = records.train
    if train.layout.kind == "chat":
        require_template(tokenizer, train.origin)
    longest = min(data.max_length, _positions(model, tokenizer))
    encoder = Encoder(tokenizer, longest, train.origin)
    parts = records.map(lambda part: part.select(range(len(part))[:max_examples]))
    rows = parts.map(lambda part: encoder.rows(part) if len(part) else [])
    count = len(records.train) + len(records.validation) + len(records.test)
    what = train.describe(count, template=bool(tokenizer.chat_template))
    sizes = describe_parts(rows if max_examples is None else records, data)
    return replace(_task(model, tokenizer, rows), about=f"{what}; {sizes}")


def _task(model: Any, tokenizer: Any, rows: Split[list[Row]]) -> Task:
    """Return the task of encoded examples, scored by how likely their answers are."""
    examples = rows.map(datasets.Dataset.from_list)
    return Task(
        models=MODELS,
        model=model,
        train=examples.train,
        validation=by_length(examples.validation),
        test=by_length(examples.test),
        collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        head=MODELS.head(model),
        metric=partial(scored_measures, tokenizer=tokenizer),
        reduce=token_losses,
        score_name="one over the perplexity per character",
    )


def load_model(recipe: Recipe) -> tuple[Any, Any]:
    """Return a recipe's causal language model and its tokenizer, which can pad."""
    what = "a causal language model and its tokenizer"
    model, tokenizer, _ = load_pretrained(MODELS, recipe, what, _INSTEAD)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _dtype(recipe: Recipe) -> torch.dtype:
    """Return the type of the weights that are loaded.

    Adapters are float32 above a 16-bit base; weights that are trained themselves must not be of 16
    bits.
    """
    trained = find_method(recipe.method).trains_base or recipe.adapter.bias != "none"
    half = recipe.training.precision == "bf16" and not trained
    return torch.bfloat16 if half else torch.float32


def _evaluation(
    recipe: Recipe, tokenizer: Any, pairs: Split[list[Pair]]
) -> Callable[[Any, Part, Path], dict[str, float]] | None:
    """Return what scores the model after training; None where the metric does."""
    if not any(pair.choices for pair in pairs.test):
        return None
    longest = recipe.data.max_length

    def share(model: Any, part: Part, _: Path) -> dict[str, float]:
        examples = pairs.validation if part == "validation" else pairs.test
        return {"score": share_chosen(model, tokenizer, examples, longest)}

    return share


def _bundled_pairs(recipe: Recipe) -> Split[list[Pair]]:
    """Return prompts and answers of one of our tasks.

    What the task holds out is validated on first, then tested on.
    """
    require_task(recipe.task, tuple(TASKS), "language generation")
    data = recipe.data
    held_out = data.validation + data.test
    pairs = TASKS[recipe.task].examples(data.train, held_out)
    if len(pairs.train) < data.train or len(pairs.test) < held_out:
        keys = "data.validation + data.test" if data.validation else "data.test"
        raise ConfigError(
            f"data.train is {data.train} and {keys} {held_out}, but task {recipe.task!r} has"
            f" {len(pairs.train)} and {len(pairs.test)} examples; lower them"
        )
    return Split(pairs.train, pairs.test[: data.validation], pairs.test[data.validation :])


def _user_records(recipe: Recipe) -> Split[Records]:
    """Return the records of `data.source`, of one layout in all parts."""
    data = recipe.data
    origin = own_origin(data)
    records: Split[Records] = load_examples(
        recipe,
        lambda table: find_records(table, data.columns, origin),
        tuple(TASKS),
        _OFFLINE,
        content=iter,
    )
    if records.train.layout != records.test.layout:
        raise DataError(
            f"{origin.source!r} mixes shapes: its split {data.train_split!r} holds"
            f" {', '.join(records.train.layout.columns)}, and {data.test_split!r}"
            f" {', '.join(records.test.layout.columns)}; name those to read with data.columns"
        )
    return records


def _sources(recipe: Recipe) -> list[DataSource]:
    data = recipe.data
    if recipe.task == question_sets.TASK:
        sets = question_sets.SETS.values()
        return set_sources(data, [(each.source, each.subset) for each in sets])
    if recipe.task == mathematics.TASK:
        return set_sources(data, mathematics.SETS)
    if data.source is None and recipe.task == reviews.TASK.name:
        return [DataSource(None, files=(corpora.ARCHIVE,))]
    return own_sources(data)


MODELS = ModelKind(
    loader="AutoModelForCausalLM",
    demo=lambda recipe: asset("llama-small"),
    head=lambda model: ["lm_head"],
    new_head=False,
    task_type="CAUSAL_LM",
    processor="AutoTokenizer",
    dtype=_dtype,
)
DOMAIN = Domain("generation", prepare, MODELS, _sources, version=2)
