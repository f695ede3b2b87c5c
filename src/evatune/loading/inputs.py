"""The inputs of `evatune init`: a model, batches of the user's data, and a sentence on these."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from evatune.loading.batches import ShuffledBatches

# Shows what is being loaded while the block runs.
Loading = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """The model and the data that the user names.

    Attributes:
        model, data: hub id or path. shown: the data's name in messages.
        columns: that hold the records; none: they are recognized. label_column: that of the
            classes; None: `label` or `labels`.
        chat_template: a Jinja file, or a model that has one; None: the tokenizer's.
        max_length: tokens of a text. needs_loss: batches must have labels.
    """

    model: str | Path
    data: str | Path
    shown: str
    columns: tuple[str, ...]
    label_column: str | None
    chat_template: str | None
    split: str
    task: str
    device: str
    dtype: str
    trust_remote_code: bool
    batch_size: int
    max_length: int
    seed: int
    needs_loss: bool


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A model with batches of its data.

    Attributes:
        task: what the model is loaded as. peft_task: PEFT's name of it, None where it has none.
        fresh: weights that are not in the checkpoint. head: modules to be trained in full, of such
            weights.
        labels_only: True: only tokens with a loss count.
        length: tokens per text, None of images. about: a sentence on what the data are.
    """

    model: nn.Module
    task: str
    peft_task: str | None
    fresh: tuple[str, ...]
    batches: ShuffledBatches
    about: str
    length: int | None = None
    head: tuple[str, ...] = ()
    labels_only: bool = False
