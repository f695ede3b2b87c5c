"""In which cell of a grid the handwritten 3 lies, among other handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from evatune.finetune.tasks.images.base import Drawings, ImageTask, balanced_by_part
from evatune.finetune.tasks.images.digits import handwritten
from evatune.finetune.tasks.images.drawing import SIDE, finish, ground_and_ink, paint
from evatune.finetune.tasks.images.search import cell_middle, filled_cells

CELLS = 4  # per row and per column
WANTED = 3
# Of the handwritten ones, in an order of their own, so many come first and second.
_FOR_TRAINING, _FOR_VALIDATION = 1000, 400

# Digit → pictures of it.
Pictures = Mapping[int, Sequence[Image.Image]]


def draw(rng: np.random.Generator, label: int, pictures: Pictures) -> Any:
    """Return a 3 in cell `label` of 4 × 4, row by row, and three other digits elsewhere.

    Args:
        pictures: light on black.

    Returns:
        uint8 (32, 32).
    """
    ground, ink = ground_and_ink(rng)
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    others = [digit for digit in range(10) if digit != WANTED]
    for cell in filled_cells(rng, label, CELLS):
        choices = pictures[WANTED if cell == label else others[rng.integers(len(others))]]
        picture = choices[int(rng.integers(len(choices)))]
        side = int(rng.integers(15, 18))
        middle = 2 * cell_middle(cell, CELLS) + complex(*rng.integers(-1, 2, 2))
        corner = (round(middle.real - side / 2), round(middle.imag - side / 2))
        larger = picture.resize((side, side), Image.Resampling.BICUBIC)
        fine.paste(larger, corner, mask=larger)  # its black leaves the neighbors as they are
    return finish(rng, paint(ground, fine, ink), noise=0.04)


def drawings() -> Drawings:
    """Return the drawings. No handwritten digit is in two parts of the split.

    Raises DataError if scikit-learn, which has the digits, is not installed.
    """
    pictures = pictures_by_part()
    return balanced_by_part(lambda rng, label, part: draw(rng, label, pictures[part]), CELLS**2)


def pictures_by_part() -> dict[str, Pictures]:
    """Return the handwritten digits by part of the split."""
    pictures, digits = handwritten("three")
    order = np.random.default_rng(7).permutation(len(digits)).tolist()
    validated = _FOR_TRAINING + _FOR_VALIDATION
    parts = {
        "train": order[:_FOR_TRAINING],
        "validation": order[_FOR_TRAINING:validated],
        "test": order[validated:],
    }
    return {
        part: {digit: [pictures[i] for i in indices if digits[i] == digit] for digit in range(10)}
        for part, indices in parts.items()
    }


TASK = ImageTask("three", CELLS**2, drawings)
