"""A task of image classification whose images are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_DRAWN_COUNT = 9000


@dataclass(frozen=True)
class Drawings:
    """Images of a task, to be drawn.

    Attributes:
        labels: one per image.
        draw: random numbers, index of an image → uint8 (32, 32).
    """

    labels: list[int]
    draw: Callable[[np.random.Generator, int], Any]


@dataclass(frozen=True)
class ImageTask:
    """A task with images of its own.

    Attributes:
        name: in recipes.
        classes: how many there are.
        drawings: returns the images; DataError where what they are made of cannot be had.
    """

    name: str
    classes: int
    drawings: Callable[[], Drawings]


def balanced(draw: Callable[[np.random.Generator, int], Any], classes: int) -> Drawings:
    """Return drawings by label, as many of each class.

    Args:
        draw: random numbers, label → uint8 (32, 32).
    """
    labels = [index % classes for index in range(_DRAWN_COUNT)]
    return Drawings(labels, lambda rng, index: draw(rng, labels[index]))
