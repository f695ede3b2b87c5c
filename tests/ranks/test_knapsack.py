"""Ranks that are tied or come in multiples, against every plan there is; and counts of tokens
against one-hot rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.layers import LayerSpec
from evatune.ranks.allocation import Candidate, allocate
from evatune.sketch import CountSketch, ExactSketch
from evatune.sketch.spectrum import Spectrum

torch.set_num_threads(1)


def spectrum(energies: list[float]) -> Spectrum:
    values = torch.tensor(sorted(energies, reverse=True))
    return Spectrum(
        torch.eye(len(values), 8), values, float(values.sum()) * 1.5, 100, torch.zeros(8)
    )


LAYER = st.tuples(
    st.lists(st.floats(0.1, 1.0), min_size=4, max_size=4),
    st.sampled_from([(8, 4, 1, ""), (6, 8, 2, ""), (5, 5, 1, "experts"), (7, 9, 1, "attention")]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LAYER, min_size=2, max_size=6), st.sampled_from(["ranks", "parameters"]))
def test_the_plan_is_the_best_of_all_that_keep_to_ties_and_multiples(
    drawn: list[tuple[list[float], tuple[int, int, int, str]]], budget: str
) -> None:
    layers = {
        str(number): Candidate(LayerSpec(str(number), *sizes), spectrum(energies))
        for number, (energies, sizes) in enumerate(drawn)
    }
    rank_groups = list(dict.fromkeys(layer.spec.rank_key for name, layer in layers.items()))
    plan = allocate(layers, rank=2, rho=2.0, budget=budget)
    for name, layer in layers.items():
        assert plan.ranks[name] % layer.spec.groups == 0
        assert plan.ranks[name] == next(
            plan.ranks[n]
            for n, other in layers.items()
            if (other.spec.rank_key) == (layer.spec.rank_key)
        )

    def judge(ranks: dict[str, int]) -> tuple[int, float]:
        spent, worth = 0, 0.0
        for layer in layers.values():
            rank = ranks[layer.spec.rank_key]
            spent += rank * (1 if budget == "ranks" else layer.spec.parameters_per_rank)
            worth += float(layer.spectrum.energies[:rank].sum()) / layer.spectrum.total_energy
        return spent, worth

    limit = sum(
        2 * (1 if budget == "ranks" else layer.spec.parameters_per_rank)
        for layer in layers.values()
    )
    choices = []
    for rank_group in rank_groups:
        groups = next(
            layer.spec.groups
            for name, layer in layers.items()
            if (layer.spec.rank_key) == rank_group
        )
        choices.append(range(0, 5, groups))
    every = (
        judge(dict(zip(rank_groups, ranks, strict=True))) for ranks in itertools.product(*choices)
    )
    best = max(found for found in every if found[0] <= limit)
    spent, worth = judge({layer.spec.rank_key: plan.ranks[name] for name, layer in layers.items()})
    assert (spent, plan.spent) == (best[0], best[0])
    assert worth == pytest.approx(best[1], rel=1e-6)


def test_a_tied_rank_reaches_as_far_as_the_richest_of_its_layers() -> None:
    layers = {
        "0": Candidate(LayerSpec("0", 8, 8, 1, "e"), spectrum([1.0] * 4)),
        "1": Candidate(LayerSpec("1", 8, 8, 1, "e"), spectrum([1.0])),
    }
    assert set(allocate(layers, rank=4, rho=1.0).ranks.values()) == {4}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=2, max_size=5), st.booleans())
def test_counts_say_what_the_second_moment_of_one_hot_rows_says(
    batches: list[list[int]], center: bool
) -> None:
    counts, exact = CountSketch(10, 4, center=center), ExactSketch(10, 10, center=center)
    halves = [CountSketch(10, 4, center=center) for _ in range(2)]
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
