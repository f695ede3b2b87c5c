"""In which cell a shape lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evatune.finetune.tasks.images import drawing, search
from evatune.finetune.tasks.images.base import ImageTask


@pytest.mark.parametrize("wanted", [drawing.TRIANGLE, drawing.SQUARE])
@pytest.mark.parametrize("label", [0, 6, 15])
def test_one_wanted_shape_lies_in_the_cell_of_the_label_and_others_elsewhere(
    label: int, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, complex]] = []

    def noted(image: Any, outline: Any, center: complex, *rest: float) -> Any:
        drawn.append((outline, center))
        return drawing.draw_shape(image, outline, center, *rest)

    monkeypatch.setattr(search, "draw_shape", noted)
    for seed in range(10):
        drawn.clear()
        search.draw_among_shapes(np.random.default_rng(seed), label, wanted)
        cells = [int(center.imag // 8) * 4 + int(center.real // 8) for _, center in drawn]
        assert len(set(cells)) == 4
        found = [outline is wanted for outline, _ in drawn]
        assert [cell for cell, one in zip(cells, found, strict=True) if one] == [label]


def test_four_rings_lie_in_cells_apart_and_only_the_labels_ring_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[int, float]] = []

    class Noted:
        def __init__(self, image: Any) -> None:
            pass

        def arc(self, corners: Any, start: float, end: float, **_: Any) -> None:
            x, y = np.mean(corners, axis=0)
            drawn.append((int(y // 32) * 4 + int(x // 32), end - start))

    with monkeypatch.context() as patch:
        patch.setattr("evatune.finetune.tasks.images.search.ImageDraw.Draw", Noted)
        patch.setattr(search, "ground_and_ink", lambda _: (np.zeros((32, 32)), 0.9))
        search.draw_ring(np.random.default_rng(0), 6)
    assert len({cell for cell, _ in drawn}) == 4
    assert [cell for cell, reach in drawn if reach < 359] == [6]


@pytest.mark.parametrize("task", [search.SQUARES, search.RINGS])
def test_equal_random_numbers_draw_equal_images(task: ImageTask) -> None:
    drawings = task.drawings()
    one, other = (drawings.draw(np.random.default_rng(3), 2) for _ in range(2))
    assert one.shape == (drawing.SIDE, drawing.SIDE)
    assert (one == other).all()
