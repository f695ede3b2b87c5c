"""The exact search against every choice there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.ranks import knapsack
from evatune.ranks.knapsack import choose_counts

torch.set_num_threads(1)


VALUES = st.lists(st.floats(0.1, 1.0), max_size=4)
CLASSES = st.dictionaries(st.integers(1, 9), VALUES, min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(CLASSES, st.integers(0, 40), st.sampled_from([1e-18, 1.0, 1e18]))
def test_no_other_counts_spend_more_or_as_much_to_more_value(
    drawn: dict[int, list[float]], limit: int, unit: float
) -> None:
    values = {
        cost: sorted((unit * value for value in worth), reverse=True)
        for cost, worth in drawn.items()
    }

    def spent_and_value(counts: dict[int, int]) -> tuple[int, float]:
        spent = sum(cost * count for cost, count in counts.items())
        return spent, sum(sum(values[cost][:count]) for cost, count in counts.items())

    choices = itertools.product(*(range(len(worth) + 1) for worth in values.values()))
    every = [spent_and_value(dict(zip(values, choice, strict=True))) for choice in choices]
    best = max(one for one in every if one[0] <= limit)
    spent, value = spent_and_value(choose_counts(values, limit))
    assert spent == best[0]
    assert value == pytest.approx(best[1], rel=1e-6)


def test_a_table_that_would_be_too_large_gives_way_to_the_greedy_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {3: [3.0, 3.0], 4: [3.9, 3.9], 5: [4.8, 4.8]}
    assert choose_counts(values, 9) == {3: 0, 4: 1, 5: 1}
    monkeypatch.setattr(knapsack, "_MAX_CELLS", 1)
    greedy = choose_counts(values, 9)
    assert greedy[3] == 2
    assert sum(cost * count for cost, count in greedy.items()) <= 9
