"""Counting shapes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from evatune.finetune.tasks.images import counting, drawing


@pytest.mark.parametrize("label", range(counting.MOST_SHAPES))
def test_there_is_one_shape_more_than_the_label_says_each_apart_and_whole(
    label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, complex, float]] = []

    def noted(
        image: Any, outline: Any, center: complex, radius: float, angle: float, ink: float
    ) -> Any:
        after = drawing.draw_shape(image, outline, center, radius, angle, ink)
        assert abs(after - image).max() > 0.2  # it can be seen
        drawn.append((outline, center, radius))
        return after

    monkeypatch.setattr(counting, "draw_shape", noted)
    for seed in range(10):
        drawn.clear()
        counting.draw(np.random.default_rng(seed), label)
        assert len(drawn) == label + 1
        assert len({id(outline) for outline, _, _ in drawn}) == 1
        for _, center, radius in drawn:
            for place in (center.real, center.imag):
                assert radius <= place <= drawing.SIDE - radius
        for (_, one, radius), (_, other, size) in combinations(drawn, 2):
            assert abs(one - other) > radius + size


def test_the_labels_of_the_task_are_those_it_draws_by() -> None:
    drawings = counting.TASK.drawings()
    for index in (0, 1, 7, 199):
        image = drawings.draw(np.random.default_rng(index), index)
        expected = counting.draw(np.random.default_rng(index), drawings.labels[index])
        assert (image == expected).all()
