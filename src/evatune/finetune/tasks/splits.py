"""The three parts of a task's examples, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from evatune.errors import ConfigError
from evatune.finetune.recipe import DataOptions

_Part = TypeVar("_Part")
_Other = TypeVar("_Other")


@dataclass(frozen=True)
class Split(Generic[_Part]):
    """The examples to train on, to choose settings by, and to test on.

    No example is in two of the parts.
    """

    train: _Part
    validation: _Part
    test: _Part

    def map(self, function: Callable[[_Part], _Other]) -> Split[_Other]:
        """Return the split of what the function makes of each part."""
        return Split(function(self.train), function(self.validation), function(self.test))


def draw_split(total: int, data: DataOptions, task: str) -> Split[list[int]]:
    """Return the indices of each part's examples, drawn with the seed 0.

    Raises ConfigError if there are not enough examples.
    """
    parts = draw(total, task, train=data.train, validation=data.validation, test=data.test)
    return Split(*parts)


def draw_from(parts: Split[range], data: DataOptions, task: str) -> Split[list[int]]:
    """Return the indices of each part's examples, drawn with the seed 0 from that part's own.

    Raises ConfigError if there are not enough examples.
    """

    def chosen(key: str, size: int) -> list[int]:
        of_part = vars(parts)[key]
        (drawn,) = draw(len(of_part), task, **{key: size})
        return [of_part[i] for i in drawn]

    return Split(*(chosen(key, vars(data)[key]) for key in vars(parts)))


def draw(total: int, task: str, **sizes: int) -> list[list[int]]:
    """Return as many indices per key of `data` as it has examples, drawn with the seed 0.

    Raises ConfigError if there are not enough examples.
    """
    count = sum(sizes.values())
    if count > total:
        keys = " + ".join(f"data.{key}" for key, size in sizes.items() if size)
        raise ConfigError(f"{keys} is {count}, but task {task!r} has {total} examples; lower them")
    order = iter(np.random.default_rng(0).permutation(total).tolist())
    return [list(islice(order, size)) for size in sizes.values()]
