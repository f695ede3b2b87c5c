"""How many shapes there are."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from evatune.finetune.tasks.images.base import ImageTask, balanced
from evatune.finetune.tasks.images.drawing import SIDE, TURN, any_shape, draw_shape, finish

MOST_SHAPES = 5


def draw(rng: np.random.Generator, label: int) -> Any:
    """Return `label` + 1 shapes of one kind on an even ground, of unlike size and brightness.

    Returns:
        uint8 (32, 32).
    """
    image = np.full((SIDE, SIDE), rng.choice([0.1, 0.9]))
    outline = any_shape(rng)
    placed: list[tuple[complex, float]] = []
    # small shapes find room always: four large ones keep them off 642 of 784 pixels at most
    while len(placed) <= label:
        radius = rng.uniform(2, 4.5)
        center = complex(*rng.uniform(radius, SIDE - radius, 2))
        if all(abs(center - other) > 1.1 * (radius + size) for other, size in placed):
            placed.append((center, radius))
            angle, ink = rng.uniform(0, TURN), rng.uniform(0.38, 0.62)
            image = draw_shape(image, outline, center, radius, angle, ink)
    return finish(rng, image, noise=0.02)


TASK = ImageTask("counting", MOST_SHAPES, partial(balanced, draw, MOST_SHAPES))
