"""Which way a dart points."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from evatune.finetune.tasks.images.base import ImageTask, balanced
from evatune.finetune.tasks.images.drawing import SIDE, TURN, draw_shape, finish, ground_and_ink

SECTORS = 16


def draw(rng: np.random.Generator, label: int) -> Any:
    """Return a dart, slim or broad, that points into sector `label`, clockwise from the right.

    Returns:
        uint8 (32, 32).
    """
    ground, ink = ground_and_ink(rng)
    center = complex(*rng.uniform(8, SIDE - 8, 2))
    angle = TURN * (label + rng.uniform(-0.5, 0.5)) / SECTORS
    wing = 1j * rng.uniform(0.35, 0.9)
    dart = np.array([1.25, -0.75 + wing, -0.75 - wing])
    image = draw_shape(ground, dart, center, rng.uniform(4, 8), angle, ink)
    return finish(rng, image, noise=0.06)


TASK = ImageTask("orientation", SECTORS, partial(balanced, draw, SECTORS))
