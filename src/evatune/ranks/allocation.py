"""Redistributes a rank budget over layers. Pure: needs spectra and sizes, no model.

The paper's rule: put the components of all layers into one list, sort by a metric of the variance
that each explains, keep as many as the budget allows. A layer's rank is the number of its
components kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evatune.choices import (
    BUDGETS,
    DEFAULT_BUDGET,
    DEFAULT_METRIC,
    DEFAULT_RHO,
    METRICS,
    Budget,
    Metric,
    RankBudget,
    is_whole,
    largest_rank,
    require_choice,
    require_rho,
    require_whole,
)
from evatune.errors import BudgetError, ConfigError
from evatune.layers import LayerSpec
from evatune.ranks.knapsack import choose_counts
from evatune.sketch.spectrum import Spectrum
from evatune.utils.shown import Shown
from evatune.utils.text import shortened

_SHOWN = 5  # entries of a rank pattern in a message


@dataclass(frozen=True)
class Candidate:
    """A layer to be given a rank, by the energies of its components."""

    spec: LayerSpec
    spectrum: Spectrum


@dataclass(frozen=True)
class RankPlan(Shown):
    """The rank of every layer, and the budget and options they were found with."""

    ranks: dict[str, int]  # every layer keeps its key, also with rank 0
    rank: int
    rho: float
    budget: Budget
    metric: Metric
    limit: int  # the budget, in its unit
    spent: int  # what the ranks cost, in the same unit
    parameters: int  # trainable parameters of A and B together
    # the same with `rank` in every layer, or its cap where it has one of its own
    uniform_parameters: int

    def __repr__(self) -> str:
        """Return one line: how far ranks were spread, and what they cost."""
        ranks = self.ranks.values()
        return (
            f"<RankPlan of {len(ranks)} layers: {sum(ranks)} ranks, {min(ranks, default=0)} to"
            f" {max(ranks, default=0)} where LoRA has {self.rank}; {self.parameters} parameters,"
            f" LoRA {self.uniform_parameters}>"
        )


def allocate(
    layers: Mapping[str, Candidate],
    *,
    rank: int,
    rho: float = DEFAULT_RHO,
    budget: Budget = DEFAULT_BUDGET,
    metric: Metric = DEFAULT_METRIC,
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
            spectra); but spectra of gradients, which lie in few directions where labels are few,
            do not bound it so, and A gets random orthonormal rows beyond them.
        budget: "ranks" spends N·r ranks over N layers (the paper). "parameters" spends
            r·Σ(in + out) parameters, each component costing the in + out of its layer.
        metric: what a component λ_j of a layer is worth: "ratio" λ_j / total energy (the paper's
            default), "raw" λ_j (of gradients, of which energies have one unit in all layers: λ_j
            times the layer's rows), "max" λ_j / λ_1, "sum" λ_j / Σ of the layer's components in
            reach, j ≤ cap.
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
    rank_budget = RankBudget(rank=rank, rho=rho, budget=budget, metric=metric)
    _require_options(rank_budget, min_rank)
    caps = _checked_caps(caps or {}, layers)
    floors = {name: max(min_rank, (floors or {}).get(name, 0)) for name in layers}
    specs = {name: layer.spec for name, layer in layers.items()}
    usable = {name: _usable_rank(layer) for name, layer in layers.items()}
    groups = _rank_groups(specs, usable, rank_budget, caps, floors)
    _require_room(groups, rank_budget, caps)
    limit = sum(group.uniform_rank * group.cost for group in groups)
    left = limit - sum(group.floor * group.cost for group in groups)
    if left < 0:
        raise BudgetError(
            f"min_rank={min_rank} alone costs {limit - left} {budget}, the budget is {limit};"
            " lower it"
        )
    group_ranks = _redistribute(groups, layers, metric, left)
    rank_of = {name: group_ranks[group.key] for group in groups for name in group.names}
    ranks = {name: rank_of[name] for name in layers}
    uniform_ranks = {name: caps.get(name, rank) for name in layers}
    return RankPlan(
        ranks=ranks,
        rank=rank,
        rho=rho,
        budget=budget,
        metric=metric,
        limit=limit,
        spent=sum(group_ranks[group.key] * group.cost for group in groups),
        parameters=_parameters(layers, ranks),
        uniform_parameters=_parameters(layers, uniform_ranks),
    )


def require_wide_enough(
    specs: Iterable[LayerSpec], rank_budget: RankBudget, caps: Mapping[str, int]
) -> None:
    """Raise the BudgetError of `allocate` for layers too narrow for it, whatever their spectra."""
    by_name = {spec.name: spec for spec in specs}
    widest = {name: spec.max_rank for name, spec in by_name.items()}
    groups = _rank_groups(by_name, widest, rank_budget, caps, floors={})
    _require_room(groups, rank_budget, caps)


def value_gained(
    layers: Mapping[str, Candidate], old: RankPlan, new: RankPlan, caps: Mapping[str, int]
) -> float:
    """Return the share of `new`'s total value that `old`'s ranks would miss.

    Both by the metric of `new`, and the spectra of `layers` and the caps for which `new` was made.
    Ranks that move between components of equal value gain nothing.
    """
    largest = largest_rank(new.rank, new.rho)
    value_of_old, value_of_new = 0.0, 0.0
    for name, layer in layers.items():
        cap = min(caps.get(name, largest), _usable_rank(layer))
        values = _values(layer.spectrum, new.metric, cap)
        value_of_old += math.fsum(values[: old.ranks.get(name, 0)])
        value_of_new += math.fsum(values[: new.ranks.get(name, 0)])
    return max(0.0, 1 - value_of_old / value_of_new) if value_of_new > 0 else 0.0


@dataclass(frozen=True)
class _RankGroup:
    """Layers that have one rank; most often a single one.

    Attributes:
        key: of the group; a single layer's name.
        names: of its layers.
        step: ranks come in multiples of this, as do `cap` and, unless the cap is lower, `floor`.
        uniform_rank: without redistribution.
        cost: of one rank in all its layers, in the unit of the budget.
    """

    key: str
    names: list[str]
    step: int
    uniform_rank: int
    cap: int
    floor: int
    cost: int


def _rank_groups(
    specs: Mapping[str, LayerSpec],
    usable: Mapping[str, int],  # ranks of each layer, at most
    rank_budget: RankBudget,
    caps: Mapping[str, int],
    floors: Mapping[str, int],
) -> list[_RankGroup]:
    """Return the layers by rank group, each group with the bounds of its rank."""
    members: dict[str, list[str]] = {}
    for name, spec in specs.items():
        members.setdefault(spec.rank_group or name, []).append(name)
    largest = largest_rank(rank_budget.rank, rank_budget.rho)
    in_parameters = rank_budget.budget == "parameters"
    groups = []
    for key, names in members.items():
        tied = [specs[name] for name in names]
        step = tied[0].groups
        cap = max(min(caps.get(name, largest), usable[name]) for name in names) // step * step
        floor = max(floors.get(name, 0) for name in names)
        groups.append(
            _RankGroup(
                key=key,
                names=names,
                step=step,
                uniform_rank=caps.get(names[0], rank_budget.rank),
                cap=cap,
                floor=min(math.ceil(floor / step) * step, cap),
                cost=sum(spec.parameters_per_rank if in_parameters else 1 for spec in tied),
            )
        )
    return groups


def _require_room(
    groups: Sequence[_RankGroup], rank_budget: RankBudget, caps: Mapping[str, int]
) -> None:
    """Raise a BudgetError where the groups' caps leave less room than their uniform ranks cost."""
    limit = sum(group.uniform_rank * group.cost for group in groups)
    room = sum(group.cap * group.cost for group in groups)
    if room >= limit:
        return
    tight = {group.key: group.cap for group in groups if group.cap < group.uniform_rank}
    named = shortened([f"{key} ({cap})" for key, cap in tight.items()])
    share = f"{rank_budget.rank} or its cap" if caps else f"{rank_budget.rank}"
    layers = sum(len(group.names) for group in groups)
    raise BudgetError(
        f"the budget of {limit} {rank_budget.budget} ({share} per layer over {layers} layers)"
        f" cannot be met: the layers take at most {room}. Below {share}: {named or 'none'}. Lower"
        f" rank, raise rho (now {rank_budget.rho:g}), use more data, leave these layers out of the"
        f" targets, or give them ranks of their own: LoraConfig(rank_pattern={_pattern(tight)})"
    )


def _pattern(ranks: Mapping[str, int]) -> str:
    """Return a rank pattern as it is written, with the first few of many layers."""
    items = [f"{name!r}: {max(rank, 1)}" for name, rank in ranks.items()]
    more = ", …" if len(items) > _SHOWN else ""
    return "{" + ", ".join(items[:_SHOWN]) + more + "}"


def _redistribute(
    groups: Sequence[_RankGroup], layers: Mapping[str, Candidate], metric: str, budget: int
) -> dict[str, int]:
    """Return the rank of every group: its floor, and what it gets of the budget beyond."""
    # One list per cost class, in the stated order; within a class the best m components are its
    # first m.
    classes: dict[int, list[tuple[float, int, int]]] = {}
    for order, group in enumerate(groups):
        values = [_values(layers[name].spectrum, metric, group.cap) for name in group.names]
        components = classes.setdefault(group.step * group.cost, [])
        for j in range(group.floor, group.cap, group.step):
            gain = math.fsum(gain for gains in values for gain in gains[j : j + group.step])
            components.append((-gain, j, order))
    ranked = {cost: sorted(classes[cost]) for cost in sorted(classes) if classes[cost]}
    gains = {cost: [-loss for loss, _, _ in items] for cost, items in ranked.items()}
    ranks = {group.key: group.floor for group in groups}
    for cost, count in choose_counts(gains, budget).items():
        for _, _, order in ranked[cost][:count]:
            ranks[groups[order].key] += groups[order].step
    return ranks


def _values(spectrum: Spectrum, metric: str, cap: int) -> list[float]:
    """Return the value of each component of a layer by the metric."""
    energies = spectrum.energies.double()
    if not len(energies) or spectrum.total_energy <= 0:
        return []
    # energies of gradients have one unit in all layers as sums over the data, not per row
    raw = 1.0 if spectrum.inputs is None else 1.0 / spectrum.rows
    divisor = {
        "ratio": spectrum.total_energy,
        "raw": raw,
        "max": float(energies[0]),
        "sum": float(energies[:cap].sum()),
    }[metric]
    values: list[float] = (energies / divisor).tolist()
    return values


def _parameters(layers: Mapping[str, Candidate], ranks: Mapping[str, int]) -> int:
    """Return the trainable parameters of A and B of all layers."""
    return sum(ranks[name] * layer.spec.parameters_per_rank for name, layer in layers.items())


def _usable_rank(layer: Candidate) -> int:
    """Return the most ranks that a layer can use."""
    widest = layer.spec.max_rank
    of_gradients = layer.spectrum.inputs is not None
    if of_gradients and layer.spectrum.usable:
        return widest  # the inputs have more directions than the gradients, and A is completed
    return min(widest, layer.spectrum.usable)


def _require_options(rank_budget: RankBudget, min_rank: int) -> None:
    """Raise a ConfigError for an option out of its range."""
    rank = rank_budget.rank
    require_whole("rank", rank, 1)
    require_rho(rank_budget.rho)
    require_choice("metric", rank_budget.metric, METRICS)
    require_choice("budget", rank_budget.budget, BUDGETS)
    if not is_whole(min_rank) or not 0 <= min_rank <= rank:
        raise ConfigError(
            f"min_rank is {min_rank!r}; it must be a whole number between 0 and rank ({rank})"
        )


def _checked_caps(caps: Mapping[str, int], layers: Mapping[str, Candidate]) -> dict[str, int]:
    """Return the caps; raise a ConfigError for one that is of no layer or out of its range."""
    for name, cap in caps.items():
        if name not in layers:
            raise ConfigError(
                f"caps names {name!r}, which is no layer; the layers are"
                f" {shortened(list(layers)) or 'none'}"
            )
        if not is_whole(cap) or cap < 1:
            raise ConfigError(
                f"the cap of {name} is {cap!r}; it must be a whole number of at least 1"
            )
    return dict(caps)
