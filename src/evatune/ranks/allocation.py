"""Which layer gets how many ranks. Pure: needs spectra and sizes, no model.

The paper's rule: put the components of all layers into one list, sort by a metric of the variance
that each explains, keep as many as the budget allows. A layer's rank is the number of its
components kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evatune.errors import BudgetError, ConfigError
from evatune.layers import LayerSpec
from evatune.ranks.knapsack import _choose
from evatune.sketch.spectrum import Spectrum

METRICS = ("ratio", "raw", "max", "sum")


BUDGETS = ("ranks", "parameters")


@dataclass(frozen=True)
class Candidate:
    """One layer as the redistribution sees it."""

    spec: LayerSpec
    spectrum: Spectrum


@dataclass(frozen=True)
class RankPlan:
    """Layer → rank, and what it was made for."""

    ranks: dict[str, int]  # every layer keeps its key, also with rank 0
    rank: int
    rho: float
    budget: str  # "ranks" or "parameters"
    metric: str
    limit: int  # the budget, in its unit
    spent: int  # what the ranks cost, in the same unit
    parameters: int  # trainable parameters of A and B together
    # the same with `rank` in every layer, or its cap where it has one of its own
    uniform_parameters: int


def allocate(
    layers: Mapping[str, Candidate],
    *,
    rank: int,
    rho: float = 2.0,
    budget: str = "ranks",
    metric: str = "ratio",
    min_rank: int = 0,
    caps: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
) -> RankPlan:
    """Redistribute a rank budget over layers.

    Args:
        layers: layer name → spectrum and sizes, in model order.
        rank: r, the rank that every layer would have without redistribution. At least 1.
        rho: ρ ≥ 1. No layer gets more than ⌊ρ·r⌋, nor more than min(in, out), nor more than its
            spectrum has directions with energy (of layers with one rank: the richest of their
            spectra).
        budget: "ranks" spends N·r ranks over N layers (the paper). "parameters" spends
            r·Σ(in + out) parameters, each component costing the in + out of its layer.
        metric: what a component λ_j of a layer is worth: "ratio" λ_j / total energy (the paper's
            default), "raw" λ_j, "max" λ_j / λ_1, "sum" λ_j / Σ of the layer's components in reach,
            j ≤ cap.
        min_rank: ranks that every layer with energy gets first, as far as its cap allows.
        caps: layer name → the most ranks it may get, instead of ⌊ρ·r⌋. In the budget and in
            `uniform_parameters` such a layer counts with its cap, not with r. So ρ = 1 gives every
            layer its cap or r, and PEFT's `rank_pattern` in the role of `caps` costs what it costs
            without redistribution.
        floors: layer name → the fewest ranks it gets, as `min_rank` of that layer alone.

    Returns:
        The plan with the greatest sum of metrics among those that spend the budget exactly, or,
        where no choice of components does so (possible for parameters, and where ranks are tied or
        come in multiples), among those that spend most of it. Ties go to the lower component index,
        then to the earlier layer.

    Raises:
        ConfigError: an option is out of range. BudgetError: the caps leave less room than the
            budget, or `min_rank` alone costs more.

    Cost: O(M log M) for M components in ranks; for parameters an exact search over the distinct
    layer costs, which stays below a few seconds for models of common shape and, for pathological
    shapes only, gives way to filling the budget greedily by metric per parameter, never above it.
    """
    for name, value in (("rank", rank), ("min_rank", min_rank)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    require_rho(rho)
    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; choose one of {', '.join(METRICS)}")
    if budget not in BUDGETS:
        raise ConfigError(f"budget is {budget!r}; choose one of {', '.join(BUDGETS)}")
    if min_rank < 0 or min_rank > rank:
        raise ConfigError(f"min_rank is {min_rank}; it must lie between 0 and rank ({rank})")

    own = _own_caps(caps or {}, layers)
    usual = {name: own.get(name, rank) for name in layers}  # without redistribution
    most = math.floor(rank * rho + 1e-9)
    rank_groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        rank_groups.setdefault(layer.spec.rank_group or name, []).append(name)
    steps = {rank_group: layers[tied[0]].spec.groups for rank_group, tied in rank_groups.items()}
    caps = {}
    for rank_group, tied in rank_groups.items():
        top = max(_top(layers[name], own.get(name, most)) for name in tied)
        caps[rank_group] = top - top % steps[rank_group]
    costs = {
        rank_group: sum(
            1 if budget == "ranks" else layers[name].spec.parameters_per_rank for name in tied
        )
        for rank_group, tied in rank_groups.items()
    }
    limit = sum(usual[rank_groups[rank_group][0]] * cost for rank_group, cost in costs.items())
    room = sum(caps[rank_group] * costs[rank_group] for rank_group in rank_groups)
    if room < limit:
        tight = [
            f"{rank_group} ({cap})"
            for rank_group, cap in caps.items()
            if cap < usual[rank_groups[rank_group][0]]
        ]
        share = f"{rank} or its cap" if own else f"{rank}"
        raise BudgetError(
            f"the budget of {limit} {budget} ({share} per layer over {len(layers)} layers) cannot"
            f" be met: the layers take at most {room}. Below {share}: {_some(tight) or 'none'}."
            f" Lower rank, raise rho (now {rho:g}), use more data, or leave these layers out of the"
            " targets"
        )

    forced = {}
    for rank_group, tied in rank_groups.items():
        least = max(min_rank, *(floors.get(name, 0) for name in tied)) if floors else min_rank
        forced[rank_group] = min(
            -(-least // steps[rank_group]) * steps[rank_group], caps[rank_group]
        )
    left = limit - sum(forced[rank_group] * costs[rank_group] for rank_group in rank_groups)
    if left < 0:
        raise BudgetError(
            f"min_rank={min_rank} alone costs {limit - left} {budget}, the budget is {limit};"
            " lower it"
        )

    # One list per cost class, in the stated order; within a class the best m components are its
    # first m.
    classes: dict[int, list[tuple[float, int, int, str]]] = {}
    for order, (rank_group, tied) in enumerate(rank_groups.items()):
        step = steps[rank_group]
        worth = [_worth(layers[name].spectrum, metric, caps[rank_group]) for name in tied]
        for j in range(forced[rank_group], caps[rank_group], step):
            gain = math.fsum(share for values in worth for share in values[j : j + step])
            classes.setdefault(step * costs[rank_group], []).append((-gain, j, order, rank_group))
    sorted_classes = {cost: sorted(items) for cost, items in sorted(classes.items())}
    taken = _choose(
        {cost: [-item[0] for item in items] for cost, items in sorted_classes.items()}, left
    )

    found = dict(forced)
    for cost, count in taken.items():
        for item in sorted_classes[cost][:count]:
            found[item[3]] += steps[item[3]]
    ranks = {name: found[layer.spec.rank_group or name] for name, layer in layers.items()}
    return RankPlan(
        ranks=ranks,
        rank=rank,
        rho=rho,
        budget=budget,
        metric=metric,
        limit=limit,
        spent=sum(found[rank_group] * costs[rank_group] for rank_group in rank_groups),
        parameters=sum(
            ranks[name] * layer.spec.parameters_per_rank for name, layer in layers.items()
        ),
        uniform_parameters=sum(
            usual[name] * layer.spec.parameters_per_rank for name, layer in layers.items()
        ),
    )


def _top(layer: Candidate, cap: int) -> int:
    """The most ranks a layer can use, within its cap."""
    return min(cap, layer.spec.in_features, layer.spec.out_features, layer.spectrum.usable)


def _own_caps(caps: Mapping[str, int], layers: Mapping[str, Candidate]) -> dict[str, int]:
    for name, cap in caps.items():
        if name not in layers:
            raise ConfigError(
                f"caps names {name!r}, which is no layer; the layers are"
                f" {_some(list(layers)) or 'none'}"
            )
        if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
            raise ConfigError(
                f"the cap of {name} is {cap!r}; it must be a whole number of at least 1"
            )
    return dict(caps)


def require_rho(rho: float) -> None:
    """Raise a ConfigError unless 1 ≤ ρ < ∞."""
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 1 <= rho < math.inf:
        raise ConfigError(
            f"rho is {rho!r}; it must be a number of at least 1 (1 = no redistribution, 2 = the"
            " usual choice)"
        )


def _worth(spectrum: Spectrum, metric: str, cap: int) -> list[float]:
    energies = spectrum.energies.double()
    if not len(energies) or spectrum.total_energy <= 0:
        return []
    divisor = {
        "ratio": spectrum.total_energy,
        "raw": 1.0,
        "max": float(energies[0]),
        "sum": float(energies[:cap].sum()),
    }[metric]
    values: list[float] = (energies / divisor).tolist()
    return values


def rank_shift(old: RankPlan, new: RankPlan) -> float:
    """Share of all ranks that moved from one layer to another between two plans for the same
    layers."""
    moved = sum(abs(old.ranks.get(name, 0) - rank) for name, rank in new.ranks.items()) / 2
    return moved / max(1, sum(new.ranks.values()))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
