"""A task, ready to train and to evaluate, and the domain that prepares it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from evatune.capture.recorder import RowsFunction
from evatune.errors import ConfigError
from evatune.finetune.recipe import Recipe

Part = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Model, examples and measures of one task.

    Attributes:
        models: the domain's.
        model: what is fine-tuned; its forward returns a loss when a batch holds labels.
        train, validation, test: examples, as `datasets` or as torch's `Dataset`, no example in two
            of them; `collator` turns a list of them into a batch. validation is None where the
            recipe asks for none.
        head: endings of the names of the modules that the method "head" trains.
        metric: Trainer's `compute_metrics`, at every evaluation; it gives "score" unless `evaluate`
            does.
        reduce: Trainer's `preprocess_logits_for_metrics`: what the metric needs of the logits, to
            save memory.
        evaluate: model, part ("validation" or "test"), run folder → measures after training that
            are no function of the logits on that part: generated answers, episodes in a simulator.
            It gives "score", in [0, 1], higher is better, and may write files.
        score_name: what the score is, in a few words.
        more_tests: name → examples like `test`, on which the finished run is scored as well.
        episodes: over which the score is a mean, where it is not one over examples.
        rows: evatune's choice of rows, where the model's masks do not say it.
        about: a sentence on data of the user's: what was recognized, and how they were split.
    """

    models: ModelKind
    model: Any
    train: Any
    validation: Any
    test: Any
    collator: Callable[[Any], Any]
    head: list[str]
    metric: Callable[[Any], dict[str, float]] | None = None
    reduce: Callable[[Any, Any], Any] | None = None
    evaluate: Callable[[Any, Part, Path], dict[str, float]] | None = None
    score_name: str = "accuracy"
    episodes: int | None = None
    more_tests: Mapping[str, Any] = field(default_factory=dict)
    rows: RowsFunction | None = None
    about: str = ""

    def examples(self, part: Part) -> Any:
        """Return the examples of one of the parts to evaluate on.

        Raises ConfigError where the recipe asks for none to validate on.
        """
        if part == "test":
            return self.test
        if self.validation is None:
            raise ConfigError("the task has no examples to validate on; set data.validation")
        return self.validation


UNTRAINED = "untrained"  # as model: a new one
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A run's precision → the type of its products."""


def _float32(recipe: Recipe) -> torch.dtype:
    """Return float32, whatever the checkpoint's type is; mixed precision is the trainer's."""
    return torch.float32


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """The models that a domain fine-tunes.

    Attributes:
        loader: transformers' auto class. processor: that of what prepares the inputs, or None.
        demo: recipe → folder of the small model that `model: demo` stands for.
        head: model → endings of the names of the modules that make up its head.
        new_head: the head is not in the checkpoint, so every method trains it in full.
        task_type: PEFT's name of the kind of task, None where it has none.
        dtype: recipe → of the weights that are loaded.
        untrained: the new model that `model: untrained` stands for; None where it stands for none.
    """

    loader: str
    demo: Callable[[Recipe], Path]
    head: Callable[[Any], list[str]]
    new_head: bool
    task_type: str | None
    processor: str | None
    dtype: Callable[[Recipe], torch.dtype] = _float32
    untrained: Callable[[], Any] | None = None

    def source(self, recipe: Recipe) -> str | Path:
        """Return the hub id or folder of a recipe's model."""
        return self.demo(recipe) if recipe.model == "demo" else recipe.model


@dataclass(frozen=True)
class DataSource:
    """Data that a task reads, and that may have to be downloaded.

    Attributes:
        name: hub id, or path of a file or folder; None for a file of the package index.
        subsets: of a hub data set, those that are read; of one without, None.
        files: the only ones that are read, of the hub's repository or of the package index; none is
            all.
    """

    name: str | None
    subsets: tuple[str | None, ...] = (None,)
    files: tuple[str, ...] = ()


class Prepare(Protocol):
    """Loads everything that a run of a recipe needs."""

    def __call__(self, recipe: Recipe, max_examples: int | None = None) -> Task:
        """Return the task, with at most so many examples of each part.

        What can be wrong with examples, such as their labels, is looked for in all of them first.
        """
        ...


@dataclass(frozen=True)
class Domain:
    """A kind of task: one kind of model, of data, and of measures.

    Attributes:
        name: in recipes. models: what it fine-tunes.
        version: of what its scores mean, to be raised where that changes and the examples do not.
        sources: recipe → the data that it reads, but for what comes with evatune's extras.
        prepare: loads everything that a run of the recipe needs. Raises ConfigError for an unknown
            task or sizes beyond the data, DataError where model or data cannot be had.
    """

    name: str
    prepare: Prepare
    models: ModelKind
    sources: Callable[[Recipe], list[DataSource]]
    version: int = 1


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of the examples whose class is the most likely one."""
    hits = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"score": float(hits.mean())}


def by_length(examples: Any) -> Any:
    """Return encoded examples (a `datasets.Dataset`), shortest first; None if there are none.

    So little of a batch is padding; no measure sees it.
    """
    if not len(examples):
        return None
    lengths = [len(row["input_ids"]) for row in examples]
    return examples.select(sorted(range(len(lengths)), key=lengths.__getitem__))
