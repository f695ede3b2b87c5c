"""Language generation: answers to prompts, scored by what a model writes or finds likely."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from evatune.errors import ConfigError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.base import Domain, Part, Task
from evatune.finetune.tasks.generation.base import Pair
from evatune.finetune.tasks.generation.encoding import encode
from evatune.finetune.tasks.generation.scoring import (
    measures,
    scored_measures,
    share_chosen,
    share_of_tokens,
    token_losses,
)
from evatune.finetune.tasks.generation.tasks import TASKS
from evatune.finetune.tasks.splits import Split
from evatune.finetune.tasks.user_data import load_examples, require_task
from evatune.loading.assets import asset
from evatune.loading.hub import reading, require_path

_INSTEAD = (
    "a local folder with config.json, weights and tokenizer, or model=demo as in the recipe"
    " generation-code"
)


def prepare(recipe: Recipe) -> Task:
    """Load everything a run needs. The examples depend on the sizes alone, not on the run's seed.

    The loss counts the answer's tokens only. The score is, by task: the share of an answer's
    tokens that are right after the right ones before them, where there is one right answer
    (arithmetic, dates, numbers, clock); of questions whose right choice is the most likely one, as
    a sum over its tokens (commonsense); else one over the perplexity per character, so that models
    with other tokenizers can be compared.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where model or data
    cannot be had.
    """
    pairs = _bundled_pairs(recipe) if recipe.data.source is None else _user_pairs(recipe)
    model, tokenizer = _load_model(recipe)
    longest = recipe.data.max_length
    evaluate = _evaluation(recipe, tokenizer, pairs)
    return Task(
        model=model,
        train=_encode(pairs.train, tokenizer, longest),
        validation=_to_evaluate(pairs.validation, tokenizer, longest),
        test=_to_evaluate(pairs.test, tokenizer, longest),
        collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        head=["lm_head"],
        new_head=False,
        task_type="CAUSAL_LM",
        metric=_metric(recipe, tokenizer, has_choices=evaluate is not None),
        reduce=token_losses,
        evaluate=evaluate,
    )


def _load_model(recipe: Recipe) -> tuple[Any, Any]:
    """Return a causal language model and its tokenizer, which can pad."""
    source = asset("llama-small") if recipe.model == "demo" else recipe.model
    require_path(source, "model")
    with reading(source, "a causal language model and its tokenizer", _INSTEAD):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=recipe.trust_remote_code
        )
        # Adapters are float32 above a 16-bit base; weights that are trained themselves must not be
        # of 16 bits.
        half = recipe.training.precision == "bf16" and recipe.method != "full"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.bfloat16 if half else torch.float32,
            trust_remote_code=recipe.trust_remote_code,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _encode(pairs: list[Pair], tokenizer: Any, longest: int) -> Any:
    """Return a `datasets.Dataset` of tokens and labels."""
    return datasets.Dataset.from_list([encode(tokenizer, pair, longest) for pair in pairs])


def _to_evaluate(pairs: list[Pair], tokenizer: Any, longest: int) -> Any:
    """Return the encoded pairs, or None of no pairs.

    They are in the order of their lengths, so that little of a batch is padding; no measure sees
    it.
    """
    if not pairs:
        return None
    rows = [encode(tokenizer, pair, longest) for pair in pairs]
    return datasets.Dataset.from_list(sorted(rows, key=lambda row: len(row["input_ids"])))


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


def _metric(
    recipe: Recipe, tokenizer: Any, *, has_choices: bool
) -> Callable[[Any], dict[str, float]]:
    """Return the metric of the logits, with a score unless choices give it."""
    if has_choices:
        return measures
    task = TASKS.get(recipe.task)
    if task is not None and task.one_right:
        return share_of_tokens
    return partial(scored_measures, tokenizer=tokenizer)


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


def _user_pairs(recipe: Recipe) -> Split[list[Pair]]:
    """Return prompts and answers of the user's data, or texts without a prompt."""
    columns = recipe.data.columns or ["text"]
    if len(columns) > 2:
        raise ConfigError(
            f"data.columns is {columns}; give the prompt's and the answer's column, or the text's"
            " alone"
        )
    tables = load_examples(recipe, columns, tuple(TASKS), "generation-code")

    def pairs(table: Any) -> list[Pair]:
        return [_pair([str(row[column]) for column in columns]) for row in table]

    return tables.map(pairs)


def _pair(texts: list[str]) -> Pair:
    return Pair(f"{texts[0]}\n", texts[1]) if len(texts) == 2 else Pair("", texts[0])


DOMAIN = Domain("generation", prepare, version=2)
