"""Modules whose weights are in no checkpoint, and are drawn at random when a model is loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def new_modules(model: Any, missing: Collection[str], head: list[str]) -> list[str]:
    """Return the names of the head and of other modules that a checkpoint has nothing of.

    DeBERTa's pooler is one. They are trained and saved with the head: whoever loads the result
    would draw others.

    Args:
        model: a classifier of transformers. missing: names of weights that the checkpoint lacks.
        head: names of the modules of its head.
    """
    base = model.base_model
    modules = [*model.named_children(), *(base.named_children() if base is not model else ())]
    paths = {id(module): path for path, module in model.named_modules()}
    names = list(head)
    for name, module in modules:
        weights = [f"{paths[id(module)]}.{key}" for key, _ in module.named_parameters()]
        if weights and name not in names and set(weights) <= set(missing):
            names.append(name)
    return names
