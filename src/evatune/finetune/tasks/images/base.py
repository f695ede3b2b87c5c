"""A task of image classification whose images are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evatune.finetune.tasks.splits import Split

_DRAWN_COUNT = 9000


@dataclass(frozen=True)
class Drawings:
    """Images of a task, to be drawn.

    Attributes:
        labels: one per image.
        draw: random numbers, index of an image → uint8 (32, 32).
        parts: the images from which each part of the split is drawn; None: all are alike.
    """

    labels: list[int]
    draw: Callable[[np.random.Generator, int], Any]
    parts: Split[range] | None = None


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


def balanced_by_part(
    draw: Callable[[np.random.Generator, int, str], Any], classes: int
) -> Drawings:
    """Return drawings by label and part of the split, as many of each class.

    Of 18 images 13 are to train on, 1 is to validate, and 4 are to test.

    Args:
        draw: random numbers, label, name of the part → uint8 (32, 32).
    """
    labels = _balanced_labels(classes)
    eighteenth = _DRAWN_COUNT // 18
    trained, validated = _DRAWN_COUNT - 5 * eighteenth, _DRAWN_COUNT - 4 * eighteenth
    parts = Split(range(trained), range(trained, validated), range(validated, _DRAWN_COUNT))

    def draw_index(rng: np.random.Generator, index: int) -> Any:
        (part,) = (name for name, indices in vars(parts).items() if index in indices)
        return draw(rng, labels[index], part)

    return Drawings(labels, draw_index, parts)


def balanced(draw: Callable[[np.random.Generator, int], Any], classes: int) -> Drawings:
    """Return drawings by label, as many of each class.

    Args:
        draw: random numbers, label → uint8 (32, 32).
    """
    labels = _balanced_labels(classes)
    return Drawings(labels, lambda rng, index: draw(rng, labels[index]))


def _balanced_labels(classes: int) -> list[int]:
    return [index % classes for index in range(_DRAWN_COUNT)]
