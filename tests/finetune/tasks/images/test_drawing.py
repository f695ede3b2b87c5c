"""Tools to draw images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evatune.finetune.tasks.images import drawing

_ROWS, _COLUMNS = np.mgrid[: drawing.SIDE, : drawing.SIDE] + 0.5


def _moments(image: Any) -> tuple[float, float, Any]:
    """Return the middle (right, down) of what is bright, and its spread."""
    weights = image * (image > 0.3)
    weights = weights / weights.sum()
    x, y = (weights * _COLUMNS).sum(), (weights * _ROWS).sum()
    offsets = np.stack([_COLUMNS - x, _ROWS - y]).reshape(2, -1)
    return x, y, offsets * weights.ravel() @ offsets.T


def test_a_filled_shape_has_the_area_and_the_middle_of_its_polygon() -> None:
    square = np.exp(2j * np.pi * (np.arange(4) + 0.5) / 4)
    image = drawing.draw_shape(
        np.zeros((drawing.SIDE, drawing.SIDE)), square, 12 + 20j, 8, angle=0.3, ink=1
    )
    assert image.sum() == pytest.approx(2 * 8**2, rel=0.05)
    x, y, _ = _moments(image)
    assert (x, y) == pytest.approx((12, 20), abs=0.25)


def test_the_geometry_of_a_letter_says_where_it_is_and_how_tall() -> None:
    for seed in range(10):
        image, (right, down, height, _) = drawing.letter(
            np.random.default_rng(seed), "H", "DejaVuSans", sizes=(12, 20), tilt=0, clear=1
        )
        bright = image / 255 > 0.45
        rows, columns = (np.flatnonzero(bright.any(axis)) for axis in (1, 0))
        half = drawing.SIDE / 2
        assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(half * (1 + right), abs=1)
        assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(half * (1 + down), abs=1)
        assert rows[-1] - rows[0] + 1 == pytest.approx(drawing.SIDE * height, abs=1.5)


def test_the_geometry_of_a_letter_says_how_far_it_is_turned_counterclockwise() -> None:
    for seed in range(10):
        image, (*_, turn) = drawing.letter(
            np.random.default_rng(seed),
            "l",
            "DejaVuSans",
            sizes=(20, 20),
            tilt=60,
            spread=0,
            clear=1,
            noise=0.02,
        )
        _, _, spread = _moments(image / 255)
        _, along = np.linalg.eigh(spread)[1].T
        # Turned counterclockwise, the top goes to the left: down and right have one sign.
        leaning = np.degrees(np.arctan(along[0] / along[1]))
        assert leaning == pytest.approx(180 * turn, abs=3)
