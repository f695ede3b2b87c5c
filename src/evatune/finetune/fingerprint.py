"""Digests of a task's examples and model, so that runs on others are not compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import transformers
from torch import Tensor

from evatune.finetune.head import is_in_head
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks import Task, find_domain

_EXAMPLES = 48  # of each part
_VALUES = 16  # of each weight
_DECIMALS = 3  # beyond which machines may differ


def fingerprint(recipe: Recipe) -> str:
    """Return a digest of some examples of each part, of their number, and of the model's weights.

    Equal for all methods, learning rates and seeds of a recipe.
    """
    transformers.set_seed(0)
    task = find_domain(recipe.domain).prepare(recipe)
    digest = hashlib.sha256()
    _add_examples(digest, task)
    for name, weight in _own_weights(task):
        digest.update(name.encode() + _bytes(weight.detach().flatten()[:_VALUES]))
    return digest.hexdigest()[:16]


def data_fingerprint(task: Task) -> str:
    """Return a digest of some examples of each part, and of their number."""
    digest = hashlib.sha256()
    _add_examples(digest, task)
    return digest.hexdigest()[:16]


def _add_examples(digest: Any, task: Task) -> None:
    for part in (task.train, task.validation, task.test):
        count = 0 if part is None else len(part)
        digest.update(str(count).encode())
        for index in range(0, count, max(1, count // _EXAMPLES)):
            batch = task.collator([part[index]])
            for key in sorted(batch):
                digest.update(key.encode() + _bytes(batch[key]))


def _own_weights(task: Task) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the checkpoint: a new head's are drawn."""
    for name, weight in task.model.named_parameters():
        is_drawn = task.models.new_head and is_in_head(name, task.head)
        if not is_drawn:
            yield name, weight


def _bytes(values: Any) -> bytes:
    values = values.cpu()
    if values.is_floating_point():
        values = (values.double() * 10**_DECIMALS).round().long()
    return bytes(values.numpy().tobytes())
