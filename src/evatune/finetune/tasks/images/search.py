"""In which cell of a grid the one shape lies that is asked for, among others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from evatune.finetune.tasks.images.base import ImageTask, balanced
from evatune.finetune.tasks.images.drawing import (
    DISC,
    SIDE,
    SQUARE,
    STAR,
    TRIANGLE,
    TURN,
    draw_shape,
    finish,
    ground_and_ink,
    paint,
)

CELLS = 4  # per row and per column
SHAPES = (DISC, SQUARE, STAR, TRIANGLE)
_FINE = 4  # rings are drawn this many times as large


def draw_among_shapes(rng: np.random.Generator, label: int, wanted: Any) -> Any:
    """Return the wanted shape in cell `label` of 4 × 4, row by row, and others in three cells.

    Args:
        wanted: its outline, one of `SHAPES`.

    Returns:
        uint8 (32, 32).
    """
    others = [outline for outline in SHAPES if outline is not wanted]
    image, ink = ground_and_ink(rng)
    for cell in filled_cells(rng, label, CELLS):
        outline = wanted if cell == label else others[rng.integers(len(others))]
        center = cell_middle(cell, CELLS) + complex(*rng.uniform(-0.8, 0.8, 2))
        radius, angle = rng.uniform(3, 4.2), rng.uniform(0, TURN)
        image = draw_shape(image, outline, center, radius, angle, ink)
    return finish(rng, image, noise=0.05)


def draw_ring(rng: np.random.Generator, label: int) -> Any:
    """Return a ring with a gap in cell `label` of 4 × 4, row by row, and closed rings in three.

    Returns:
        uint8 (32, 32).
    """
    ground, ink = ground_and_ink(rng)
    fine = Image.new("L", (_FINE * SIDE, _FINE * SIDE))
    for cell in filled_cells(rng, label, CELLS):
        center = cell_middle(cell, CELLS) + complex(*rng.uniform(-0.6, 0.6, 2))
        reach = rng.uniform(2.8, 3.8) * complex(1, 1)
        corners = [_FINE * (center - reach), _FINE * (center + reach)]
        start = rng.uniform(0, 360)
        ImageDraw.Draw(fine).arc(
            [(corner.real, corner.imag) for corner in corners],
            start,
            start + (290 if cell == label else 360),
            fill=255,
            width=5,
        )
    return finish(rng, paint(ground, fine, ink), noise=0.05)


def filled_cells(rng: np.random.Generator, label: int, side: int) -> list[int]:
    """Return the cell of the label, and three others at random."""
    free = [cell for cell in rng.permutation(side**2).tolist() if cell != label]
    return [label, *free[:3]]


def cell_middle(cell: int, side: int) -> complex:
    """Return the middle of a cell of a square grid over the image: right, and i times down."""
    row, column = divmod(cell, side)
    return SIDE / side * complex(column + 0.5, row + 0.5)


def _task(name: str, draw: Callable[[np.random.Generator, int], Any]) -> ImageTask:
    return ImageTask(name, CELLS**2, partial(balanced, draw, CELLS**2))


TRIANGLES = _task("triangle", partial(draw_among_shapes, wanted=TRIANGLE))
SQUARES = _task("square", partial(draw_among_shapes, wanted=SQUARE))
RINGS = _task("ring", draw_ring)
