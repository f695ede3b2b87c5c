"""Counts of tokens against the second moment of their one-hot rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.sketch import CountSketch, ExactSketch, SketchSettings


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=2, max_size=5), st.booleans())
def test_counts_say_what_the_second_moment_of_one_hot_rows_says(
    batches: list[list[int]], center: bool
) -> None:
    small = SketchSettings(10, 4, center=center)
    counts = CountSketch(small)
    exact = ExactSketch(SketchSettings(10, 10, center=center))
    halves = [CountSketch(small) for _ in range(2)]
    for number, batch in enumerate(batches):
        tokens = torch.tensor(batch, dtype=torch.long)
        counts.update(tokens)
        halves[number % 2].update(tokens)
        exact.update(torch.eye(10)[tokens])
        if number == 0:
            counts.refresh()
    answer, truth = counts.spectrum(), exact.spectrum()
    assert answer.rows == truth.rows == sum(map(len, batches))
    assert answer.total_energy == pytest.approx(truth.total_energy, abs=1e-6)
    assert torch.allclose(answer.mean, truth.mean, atol=1e-6)
    if not center:
        # Only seen tokens are directions, so that there may be fewer than were asked for.
        assert torch.allclose(answer.energies, truth.energies[: len(answer.energies)], atol=1e-6)
    else:
        # along one-hot vectors, its diagonal
        moment = truth.directions.T @ truth.energies.diag() @ truth.directions
        assert torch.allclose(
            (answer.directions @ moment * answer.directions).sum(1), answer.energies, atol=1e-5
        )
    halves[0].merge(halves[1])
    joined = halves[0].spectrum()
    assert torch.equal(joined.directions, answer.directions)
    assert torch.allclose(joined.energies, answer.energies, atol=1e-7)
    assert math.isclose(joined.total_energy, answer.total_energy, abs_tol=1e-9)
