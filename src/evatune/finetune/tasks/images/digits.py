"""Handwritten digits on cluttered grounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from evatune.finetune.tasks.images.base import Drawings, ImageTask
from evatune.finetune.tasks.images.drawing import SIDE, finish, ground_and_ink, paint, stroke
from evatune.utils.extras import extras


def draw(rng: np.random.Generator, picture: Image.Image) -> Any:
    """Return a light-on-black picture near the middle, with strokes over it.

    The strokes are as bright as the picture or its ground.

    Returns:
        uint8 (32, 32).
    """
    ground, ink = ground_and_ink(rng)
    side = int(rng.integers(40, 61))  # in pixels of the fine image
    x, y = rng.integers(-4, 5, 2) + (2 * SIDE - side) // 2
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    fine.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (int(x), int(y)))
    image = paint(ground, fine, ink)
    for _ in range(3):
        line = stroke(rng, 4)
        brightness = ink if rng.random() < 0.5 else float(ground.mean())
        image = paint(image, line, brightness)
    return finish(rng, image, noise=0.1)


def drawings() -> Drawings:
    """Return the handwritten digits of scikit-learn. MissingExtraError if it is not installed."""
    pictures, labels = handwritten("digits")
    return Drawings(labels, lambda rng, index: draw(rng, pictures[index]))


def handwritten(task: str) -> tuple[list[Image.Image], list[int]]:
    """Return scikit-learn's handwritten digits, 8 × 8, light on black, and which they are.

    Raises MissingExtraError, in which `task` is named, if it is not installed.
    """
    with extras(f"task {task!r}"):
        from sklearn.datasets import load_digits
    digits = load_digits()  # values from 0 to 16
    pictures = [Image.fromarray(np.uint8(image * (255 / 16))) for image in digits.images]
    return pictures, digits.target.tolist()


TASK = ImageTask("digits", 10, drawings)
