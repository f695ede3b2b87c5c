"""In which cell of a grid a shape lies."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from evatune.finetune.tasks.images.base import ImageTask, balanced
from evatune.finetune.tasks.images.drawing import (
    SIDE,
    TURN,
    any_shape,
    draw_shape,
    finish,
    ground_and_ink,
)

CELLS = 5  # per row and per column
_MARGIN = 4  # pixels


def draw(rng: np.random.Generator, label: int) -> Any:
    """Return a shape whose center lies in cell `label` of a grid of 5 × 5, row by row.

    Returns:
        uint8 (32, 32).
    """
    ground, ink = ground_and_ink(rng)
    row, column = divmod(label, CELLS)
    cell_side = (SIDE - 2 * _MARGIN) / CELLS
    center = complex(*(_MARGIN + cell_side * (np.array([column, row]) + rng.uniform(0, 1, 2))))
    outline = any_shape(rng)
    radius, angle = rng.uniform(2, 6), rng.uniform(0, TURN)
    return finish(rng, draw_shape(ground, outline, center, radius, angle, ink), noise=0.1)


TASK = ImageTask("location", CELLS**2, partial(balanced, draw, CELLS**2))
