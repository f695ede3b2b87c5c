"""In which cell of a grid the one shape or letter lies that is asked for, among others."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from evatune.finetune.tasks.images.base import ImageTask, balanced
from evatune.finetune.tasks.images.drawing import (
    DISC,
    PRETRAINING_FONTS,
    SIDE,
    SQUARE,
    STAR,
    TRIANGLE,
    TURN,
    draw_shape,
    finish,
    ground_and_ink,
    load_font,
    paint,
)

SHAPE_CELLS = 4  # per row and per column
LETTER_CELLS = 3
OTHER_LETTERS = "BCDEFGHJKLMNPRSTUVXYZ"
_FINE = 4  # rings are drawn this many times as large


def draw_triangle(rng: np.random.Generator, label: int) -> Any:
    """Return a triangle in cell `label` of 4 × 4, row by row, and three other shapes elsewhere.

    Returns:
        uint8 (32, 32).
    """
    image, ink = ground_and_ink(rng)
    for cell in filled_cells(rng, label, SHAPE_CELLS, others=3):
        others = (DISC, SQUARE, STAR)
        outline = TRIANGLE if cell == label else others[rng.integers(len(others))]
        center = cell_middle(cell, SHAPE_CELLS) + complex(*rng.uniform(-0.8, 0.8, 2))
        radius, angle = rng.uniform(3, 4.2), rng.uniform(0, TURN)
        image = draw_shape(image, outline, center, radius, angle, ink)
    return finish(rng, image, noise=0.05)


def draw_letter(rng: np.random.Generator, label: int) -> Any:
    """Return an A in cell `label` of 3 × 3, row by row, and four other letters elsewhere.

    Returns:
        uint8 (32, 32).
    """
    ground, ink = ground_and_ink(rng)
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    for cell in filled_cells(rng, label, LETTER_CELLS, others=4):
        text = "A" if cell == label else OTHER_LETTERS[rng.integers(len(OTHER_LETTERS))]
        name = PRETRAINING_FONTS[rng.integers(len(PRETRAINING_FONTS))]
        typeface = load_font(name, int(rng.integers(18, 23)))
        left, top, right, bottom = typeface.getbbox(text)
        middle = 2 * cell_middle(cell, LETTER_CELLS) - complex(left + right, top + bottom) / 2
        corner = middle + complex(*rng.integers(-1, 2, 2))
        ImageDraw.Draw(fine).text((corner.real, corner.imag), text, fill=255, font=typeface)
    return finish(rng, paint(ground, fine, ink), noise=0.05)


def draw_ring(rng: np.random.Generator, label: int) -> Any:
    """Return a ring with a gap in cell `label` of 4 × 4, row by row, and closed rings in three.

    Returns:
        uint8 (32, 32).
    """
    ground, ink = ground_and_ink(rng)
    fine = Image.new("L", (_FINE * SIDE, _FINE * SIDE))
    for cell in filled_cells(rng, label, SHAPE_CELLS, others=3):
        center = cell_middle(cell, SHAPE_CELLS) + complex(*rng.uniform(-0.6, 0.6, 2))
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


def filled_cells(rng: np.random.Generator, label: int, side: int, *, others: int) -> list[int]:
    """Return the cell of the label, and as many other cells as are to be filled, at random."""
    free = [cell for cell in rng.permutation(side**2).tolist() if cell != label]
    return [label, *free[:others]]


def cell_middle(cell: int, side: int) -> complex:
    """Return the middle of a cell of a square grid over the image: right, and i times down."""
    row, column = divmod(cell, side)
    return SIDE / side * complex(column + 0.5, row + 0.5)


TRIANGLES = ImageTask("triangle", SHAPE_CELLS**2, partial(balanced, draw_triangle, SHAPE_CELLS**2))
LETTERS = ImageTask("letter", LETTER_CELLS**2, partial(balanced, draw_letter, LETTER_CELLS**2))
RINGS = ImageTask("ring", SHAPE_CELLS**2, partial(balanced, draw_ring, SHAPE_CELLS**2))
