"""Which font a letter is set in."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from evatune.finetune.tasks.images.base import ImageTask, balanced
from evatune.finetune.tasks.images.drawing import letter

# They come with matplotlib, and pre-training saw none of them.
FONTS = (
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
LETTERS = "QRaeg"  # in which the fonts differ


def draw(rng: np.random.Generator, label: int) -> Any:
    """Return one of `LETTERS` in font `label` of `FONTS`, uint8 (32, 32)."""
    text = LETTERS[rng.integers(len(LETTERS))]
    image, _ = letter(rng, text, FONTS[label], sizes=(24, 32), tilt=10, spread=0.3, noise=0.06)
    return image


TASK = ImageTask("fonts", len(FONTS), partial(balanced, draw, len(FONTS)))
