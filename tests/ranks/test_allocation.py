"""The redistribution against brute force, and its laws."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evatune.choices import METRICS
from evatune.errors import BudgetError, ConfigError
from evatune.layers import LayerSpec
from evatune.ranks.allocation import Candidate, RankPlan, allocate, value_gained
from evatune.sketch.spectrum import InputMoments, Spectrum

torch.set_num_threads(1)


def candidate(
    energies: list[float], in_features: int, out_features: int, rest: float = 1.0
) -> Candidate:
    values = torch.tensor(sorted(energies, reverse=True))
    # directions and mean play no part here, and must cost nothing at the widths of real models
    nothing = torch.zeros(1)
    directions, mean = nothing.expand(len(energies), in_features), nothing.expand(in_features)
    spectrum = Spectrum(directions, values, float(values.sum()) + rest, 100, mean)
    return Candidate(LayerSpec("layer", in_features, out_features), spectrum)


def worth(layer: Candidate, metric: str, cap: int) -> list[float]:
    e = layer.spectrum.energies.double()
    by = {
        "ratio": layer.spectrum.total_energy,
        "raw": 1.0,
        "max": float(e[0]),
        "sum": float(e[:cap].sum()),
    }[metric]
    return (e / by).tolist()


def value(layers: dict[str, Candidate], plan: RankPlan, own: dict[str, int] | None = None) -> float:
    total = 0.0
    for name, layer in layers.items():
        most = (own or {}).get(name, math.floor(plan.rank * plan.rho))
        cap = min(
            most, layer.spec.in_features, layer.spec.out_features, len(layer.spectrum.energies)
        )
        total += sum(worth(layer, plan.metric, cap)[: plan.ranks[name]])
    return total


def brute_force(
    layers: dict[str, Candidate],
    rank: int,
    rho: float,
    budget: str,
    metric: str,
    least: int,
    own: dict[str, int] | None = None,
) -> tuple[int, float]:
    """(largest spend within the budget, best value at that spend) over all choices of ranks."""
    own = own or {}
    most = {name: own.get(name, math.floor(rank * rho)) for name in layers}
    caps = [
        min(most[n], c.spec.in_features, c.spec.out_features, len(c.spectrum.energies))
        for n, c in layers.items()
    ]
    costs = [1 if budget == "ranks" else c.spec.parameters_per_rank for c in layers.values()]
    gains = [
        [0.0, *itertools.accumulate(worth(c, metric, cap)[:cap])]
        for c, cap in zip(layers.values(), caps, strict=True)
    ]
    limit = sum(own.get(name, rank) * cost for name, cost in zip(layers, costs, strict=True))
    best = (-1, -1.0)
    for choice in itertools.product(*(range(min(least, cap), cap + 1) for cap in caps)):
        spend = sum(r * cost for r, cost in zip(choice, costs, strict=True))
        if spend <= limit:
            best = max(best, (spend, sum(g[r] for g, r in zip(gains, choice, strict=True))))
    return best


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    budget=st.sampled_from(["ranks", "parameters"]),
    metric=st.sampled_from(METRICS),
    rho=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    least=st.sampled_from([0, 1]),
)
def test_no_choice_of_ranks_does_better(
    seed: int, budget: str, metric: str, rho: float, least: int
) -> None:
    rng = random.Random(seed)
    rank = rng.randint(1, 3)
    sizes = [
        (rng.choice([4, 5, 8, 12]), rng.choice([4, 6, 8, 16])) for _ in range(rng.randint(1, 5))
    ]
    layers = {
        f"l{i}": candidate([10 ** rng.uniform(-3, 2) for _ in range(math.floor(rank * rho))], *size)
        for i, size in enumerate(sizes)
    }
    plan = allocate(layers, rank=rank, rho=rho, budget=budget, metric=metric, min_rank=least)
    spend, best = brute_force(layers, rank, rho, budget, metric, least)
    assert plan.spent == spend
    assert value(layers, plan) == pytest.approx(best, rel=1e-9)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    budget=st.sampled_from(["ranks", "parameters"]),
    metric=st.sampled_from(METRICS),
    rho=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_no_choice_of_ranks_below_the_layers_own_caps_does_better(
    seed: int, budget: str, metric: str, rho: float
) -> None:
    rng = random.Random(seed)
    rank = rng.randint(1, 3)
    sizes = [(rng.choice([6, 8, 12]), rng.choice([6, 8, 16])) for _ in range(rng.randint(1, 4))]
    own = {f"l{i}": rng.randint(1, 6) for i in range(len(sizes)) if rng.random() < 0.5}
    layers = {
        f"l{i}": candidate([10 ** rng.uniform(-3, 2) for _ in range(9)], *size)
        for i, size in enumerate(sizes)
    }
    plan = allocate(layers, rank=rank, rho=rho, budget=budget, metric=metric, caps=own)
    assert all(plan.ranks[name] <= cap for name, cap in own.items())
    spend, best = brute_force(layers, rank, rho, budget, metric, 0, own)
    assert plan.spent == spend
    assert value(layers, plan, own) == pytest.approx(best, rel=1e-9)


def test_with_caps_of_their_own_rho_one_gives_layers_these_or_the_rank() -> None:
    layers = {str(i): candidate([1.0 + i] * 8, 8, 8) for i in range(4)}
    plan = allocate(layers, rank=4, rho=1, caps={"0": 2, "3": 7})
    assert plan.ranks == {"0": 2, "1": 4, "2": 4, "3": 7}
    assert plan.limit == plan.spent == 17
    assert plan.parameters == plan.uniform_parameters == 17 * 16


@pytest.mark.parametrize(
    ("caps", "error", "text"),
    [
        ({"c": 1}, ConfigError, "caps names 'c', which is no layer; the layers are a, b"),
        ({"a": 0}, ConfigError, "the cap of a is 0; it must be a whole number of at least 1"),
        ({"a": True}, ConfigError, "the cap of a is True"),
        (
            {"a": 5, "b": 2},
            BudgetError,
            r"2 or its cap per layer.*cannot be met.*Below 2 or its cap: a \(4\)",
        ),
    ],
)
def test_caps_that_cannot_be_are_refused(
    caps: dict[str, int], error: type[Exception], text: str
) -> None:
    layers = {name: candidate([4, 3, 2, 1], 9, 9) for name in "ab"}
    with pytest.raises(error, match=text):
        allocate(layers, rank=2, rho=2, caps=caps)


def test_one_list_of_all_components_is_what_decides() -> None:
    layers = {
        "a": candidate([8, 4, 2, 1], 9, 9, rest=85),
        "b": candidate([50, 3, 0.5, 0.1], 9, 9, rest=46.4),
    }
    assert allocate(layers, rank=2, rho=2).ranks == {"a": 2, "b": 2}
    assert allocate(layers, rank=2, rho=2, metric="raw").ranks == {"a": 2, "b": 2}
    assert allocate(layers, rank=2, rho=2, metric="max").ranks == {"a": 3, "b": 1}


def test_rho_one_is_uniform() -> None:
    layers = {str(i): candidate([1.0 + i] * 4, 8, 8) for i in range(5)}
    assert set(allocate(layers, rank=4, rho=1).ranks.values()) == {4}


def test_ties_go_to_the_lower_component_then_to_the_earlier_layer() -> None:
    layers = {name: candidate([5, 5, 5], 9, 9) for name in ("q", "k", "v")}
    assert allocate(layers, rank=1, rho=3).ranks == {"q": 1, "k": 1, "v": 1}
    pair = {name: candidate([5, 4, 4], 9, 9) for name in ("q", "k")}
    assert allocate(pair, rank=1, rho=3).ranks == {"q": 1, "k": 1}
    unsupported = {
        "q": candidate([5, 4], 9, 9),
        "k": candidate([5, 4], 9, 9),
        "v": candidate([1, 1], 9, 9),
    }
    assert allocate(unsupported, rank=1, rho=2).ranks == {"q": 2, "k": 1, "v": 0}


def test_a_layer_of_rank_zero_keeps_its_key() -> None:
    layers = {"rich": candidate([9, 8], 9, 9), "poor": candidate([1e-3, 1e-4], 9, 9, rest=100)}
    assert allocate(layers, rank=1, rho=2).ranks == {"rich": 2, "poor": 0}


def test_minimum_rank_is_given_first() -> None:
    layers = {
        "rich": candidate([9, 8, 7, 6], 9, 9),
        "poor": candidate([1e-3, 1e-4], 9, 9, rest=100),
    }
    assert allocate(layers, rank=2, rho=2, min_rank=1).ranks == {"rich": 3, "poor": 1}


def test_a_floor_is_a_minimum_of_one_layer_alone() -> None:
    poor = {name: candidate([1e-3, 1e-4], 9, 9, rest=100) for name in ("poor", "floored")}
    layers = {"rich": candidate([9, 8, 7, 6], 9, 9)} | poor
    plan = allocate(layers, rank=2, rho=2.5, floors={"floored": 2})
    assert plan.ranks == {"rich": 4, "poor": 0, "floored": 2}
    assert allocate(layers, rank=2, rho=2.5, floors={"floored": 1}, min_rank=1).ranks["poor"] == 1


def test_a_parameter_budget_is_spent_to_the_last_parameter_on_shapes_of_real_models() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (8192, 8192),
        "k": (8192, 1024),
        "v": (8192, 1024),
        "o": (8192, 8192),
        "gate": (8192, 28672),
        "up": (8192, 28672),
        "down": (28672, 8192),
    }
    layers = {
        f"{block}.{name}": candidate((torch.rand(32, generator=generator) ** 4).tolist(), *shape)
        for block in range(80)
        for name, shape in shapes.items()
    }
    layers["lm_head"] = candidate((torch.rand(32, generator=generator) ** 4).tolist(), 8192, 128256)
    plan = allocate(layers, rank=16, rho=2, budget="parameters")
    assert plan.spent == plan.limit == plan.parameters == plan.uniform_parameters


def test_a_vocabulary_of_odd_size_does_not_stop_the_exact_search() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"attn": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "out": (3072, 768)}
    layers = {
        f"{block}.{name}": candidate((torch.rand(32, generator=generator) ** 4).tolist(), *shape)
        for block in range(12)
        for name, shape in shapes.items()
    }
    layers["lm_head"] = candidate((torch.rand(32, generator=generator) ** 4).tolist(), 768, 50257)
    plan = allocate(layers, rank=16, rho=2, budget="parameters")
    assert plan.spent == plan.limit


def test_a_budget_that_cannot_be_met_names_the_layers_that_are_too_small() -> None:
    layers = {"wide": candidate([3, 2, 1, 1], 9, 9), "narrow": candidate([3, 2], 9, 2)}
    own = r"LoraConfig\(rank_pattern={'narrow': 2}\)"
    with pytest.raises(BudgetError, match=rf"narrow \(2\).*Lower rank, raise rho .*{own}"):
        allocate(layers, rank=4, rho=1)
    assert allocate(layers, rank=4, rho=1, caps={"narrow": 2}).ranks == {"wide": 4, "narrow": 2}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "rho": 0.5}, "rho is 0.5"),
        ({"rank": 2, "rho": math.nan}, "rho is nan"),
        ({"rank": 2, "metric": "best"}, "choose one of ratio, raw, max, sum"),
        ({"rank": 2, "budget": "euros"}, "choose one of ranks, parameters"),
        ({"rank": 2, "min_rank": 3}, "min_rank is 3"),
    ],
)
def test_options_out_of_range_say_what_is_allowed(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        allocate({"a": candidate([1, 1, 1, 1], 9, 9)}, **options)  # type: ignore[arg-type]


def spectrum_of(energies: list[float]) -> Spectrum:
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
        str(number): Candidate(LayerSpec(str(number), *sizes), spectrum_of(energies))
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

    def spent_and_worth(ranks: dict[str, int]) -> tuple[int, float]:
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
        spent_and_worth(dict(zip(rank_groups, ranks, strict=True)))
        for ranks in itertools.product(*choices)
    )
    best = max(found for found in every if found[0] <= limit)
    spent, worth = spent_and_worth(
        {layer.spec.rank_key: plan.ranks[name] for name, layer in layers.items()}
    )
    assert (spent, plan.spent) == (best[0], best[0])
    assert worth == pytest.approx(best[1], rel=1e-6)


def test_a_tied_rank_reaches_as_far_as_the_richest_of_its_layers() -> None:
    layers = {
        "0": Candidate(LayerSpec("0", 8, 8, 1, "e"), spectrum_of([1.0] * 4)),
        "1": Candidate(LayerSpec("1", 8, 8, 1, "e"), spectrum_of([1.0])),
    }
    assert set(allocate(layers, rank=4, rho=1.0).ranks.values()) == {4}


def of_gradients(energies: list[float], rows: int = 100) -> Candidate:
    layer = candidate(energies, 8, 8)
    moments = InputMoments(torch.ones(len(energies)), 9.0)
    return replace(layer, spectrum=replace(layer.spectrum, rows=rows, inputs=moments))


def test_gradients_in_few_directions_do_not_bound_a_layers_rank() -> None:
    with pytest.raises(BudgetError):
        allocate({"a": candidate([4.0, 1.0], 8, 8)}, rank=4, rho=1)
    plan = allocate({"a": of_gradients([4.0, 1.0])}, rank=4, rho=1)
    assert plan.ranks == {"a": 4}


def test_raw_energies_of_gradients_count_as_sums_over_the_data() -> None:
    layers = {"few": of_gradients([1.0] * 4, rows=10), "many": of_gradients([1.0] * 4, rows=1000)}
    assert allocate(layers, rank=2, metric="raw").ranks == {"few": 0, "many": 4}


@pytest.mark.parametrize("metric", METRICS)
def test_ranks_gain_what_their_components_are_worth(metric: str) -> None:
    layers = {"a": candidate([4.0, 2.0, 1.0], 8, 8), "b": candidate([4.0, 2.0, 1.0], 8, 8, 5.0)}
    plan = allocate(layers, rank=1, rho=3, metric=metric)
    assert value_gained(layers, plan, plan, {}) == 0
    for ranks in ({"a": 1, "b": 1}, {"a": 0, "b": 2}, {"a": 2}):
        other = replace(plan, ranks=ranks)
        lost = 1 - value(layers, other) / value(layers, plan) if len(ranks) == 2 else None
        gained = value_gained(layers, other, plan, {})
        assert 0 <= gained < 1
        assert lost is None or gained == pytest.approx(lost)


def test_ranks_above_the_usual_cap_gain_by_their_own() -> None:
    layers = {name: candidate([4.0, 2.0, 1.0], 8, 8) for name in "ab"}
    caps = {"a": 3}
    plan = allocate(layers, rank=1, rho=1, metric="sum", caps=caps)
    assert plan.ranks == {"a": 3, "b": 1}
    poorer = replace(plan, ranks={"a": 1, "b": 0})
    gained = value_gained(layers, poorer, plan, caps)
    assert gained == pytest.approx(1 - (4 / 7) / (7 / 7 + 4 / 4))


def test_ranks_that_move_between_equal_components_gain_nothing() -> None:
    layers = {name: candidate([1.0] * 4, 8, 8) for name in "ab"}
    plan = allocate(layers, rank=2)
    for a in range(5):
        other = replace(plan, ranks={"a": a, "b": 4 - a})
        assert value_gained(layers, other, plan, {}) == pytest.approx(0)
