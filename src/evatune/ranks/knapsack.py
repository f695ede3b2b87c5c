"""A knapsack whose items come in few costs: the exact search behind a parameter budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Cells that the exact search for a parameter budget may fill before it settles for the greedy
# answer.
_MAX_CELLS = 400_000_000


@dataclass(frozen=True)
class _CostClass:
    """Items of one cost, of which the exact search takes some number within a window.

    Attributes:
        low: the least number.
        values: (n,), of the first `low`, `low` + 1, … items.
    """

    cost: int
    low: int
    values: Tensor


@dataclass(frozen=True)
class _Table:
    """The best choice from some cost classes, for every amount that is spent on them.

    Amounts count beyond the `low` items of every class, in multiples of `unit`.

    Attributes:
        values: (n,), of the best choice that spends 0, 1, … units; -∞ where none spends just that.
        counts: (n,), how many items of the latest class that choice takes, beyond its `low`.
        latest: the class that was added last.
        before: the table without it.
    """

    values: Tensor
    unit: int
    counts: Tensor | None = None
    latest: _CostClass | None = None
    before: _Table | None = None


def choose_counts(values: Mapping[int, Sequence[float]], limit: int) -> dict[int, int]:
    """Return how many of the leading items of each cost class to take.

    Spend as much of `limit` as possible; among such choices take the most valuable. This is a
    knapsack whose items come in few costs and, per cost, in descending order of value. Integer
    programs of this form have an optimum within 2Δ + 1 items of the one that fills the budget
    greedily by value per cost, Δ the largest cost in units of the greatest common divisor
    (Eisenbrand & Weismantel 2018, Proximity results and faster algorithms for integer programming
    using the Steinitz lemma), so the exact search need only look there.

    Args:
        values: cost → values of its items.
    """
    greedy = _greedy(values, limit)
    if len(values) <= 1:
        return greedy
    *classes, last = _cost_classes(values, limit)
    budget = limit - sum(cost_class.low * cost_class.cost for cost_class in (*classes, last))
    table = _Table(_row([0.0]), 0)
    for cost_class in classes:
        extended = _extended(table, cost_class, budget)
        if extended is None:
            return greedy
        table = extended
    return _finish(table, last, budget) or greedy


def _cost_classes(values: Mapping[int, Sequence[float]], limit: int) -> list[_CostClass]:
    """Return the classes with the windows that the exact search looks at.

    The widest windows come first: with the rest of the classes last, the table keeps a coarse unit.
    """
    unit = math.gcd(limit, *values) or 1
    center = _greedy(values, limit, stop=True)
    reach = 2 * max(values) // unit + 2
    low = {cost: max(0, center[cost] - reach) for cost in values}
    high = {cost: min(len(values[cost]), center[cost] + reach) for cost in values}
    order = sorted(values, key=lambda cost: (high[cost] - low[cost], -cost), reverse=True)
    classes = []
    for cost in order:
        sums = _row([0.0, *values[cost]]).cumsum(0)
        classes.append(_CostClass(cost, low[cost], sums[low[cost] : high[cost] + 1]))
    return classes


def _extended(table: _Table, cost_class: _CostClass, budget: int) -> _Table | None:
    """Return the table with one more class; None where it would be too large."""
    cost, choices = cost_class.cost, len(cost_class.values)
    unit = math.gcd(table.unit, cost)
    reach = (len(table.values) - 1) * table.unit + cost * (choices - 1)
    span = min(budget, reach)
    size = span // unit + 1
    if size * choices > _MAX_CELLS:
        return None
    values = table.values.new_full((size,), -math.inf)
    counts = table.values.new_zeros(size, dtype=torch.int32)
    source, ratio = table.values, 1
    if table.unit:
        source, ratio = source[: span // table.unit + 1], table.unit // unit
    for count, gain in enumerate(cost_class.values.tolist()):
        start = count * cost // unit
        if start >= size:
            break
        room = min(len(source), (size - 1 - start) // ratio + 1)
        cells = slice(start, start + (room - 1) * ratio + 1, ratio)
        candidate = source[:room] + gain
        better = candidate > values[cells]
        values[cells] = torch.where(better, candidate, values[cells])
        counts[cells].masked_fill_(better, count)
    return _Table(values, unit, counts, cost_class, table)


def _finish(table: _Table, last: _CostClass, budget: int) -> dict[int, int] | None:
    """Return the best choice of all: every count of the last class with the fullest table cell.

    None where nothing fits.
    """
    cells = torch.arange(len(table.values), dtype=torch.int64, device=table.values.device)
    # per cell, the fullest one up to it that some choice reaches
    reachable = torch.where(torch.isfinite(table.values), cells, -1).cummax(0).values
    best: tuple[int, float, int, int] | None = None  # spent, value, count of the last class, cell
    for count, gain in enumerate(last.values.tolist()):
        rest = budget - count * last.cost
        if rest < 0:
            break
        cell = int(reachable[min(rest // table.unit, len(cells) - 1)])
        if cell < 0:
            continue
        spent = cell * table.unit + count * last.cost
        value = float(table.values[cell]) + gain
        if best is None or _is_better((spent, value), best[:2]):
            best = (spent, value, count, cell)
    if best is None:
        return None
    _, _, count, cell = best
    return {last.cost: last.low + count} | _walked_back(table, cell)


def _is_better(choice: tuple[int, float], best: tuple[int, float]) -> bool:
    """Return whether (spent, value) spends more, or as much for more value than rounding gives."""
    if choice[0] != best[0]:
        return choice[0] > best[0]
    return choice[1] > best[1] + 1e-12 * abs(best[1])


def _walked_back(table: _Table, cell: int) -> dict[int, int]:
    """Return the counts of all classes of a table for the choice in one of its cells."""
    chosen: dict[int, int] = {}
    spent = cell * table.unit
    while table.before is not None:
        assert table.latest is not None
        assert table.counts is not None
        count = int(table.counts[spent // table.unit])
        chosen[table.latest.cost] = table.latest.low + count
        spent -= count * table.latest.cost
        table = table.before
    return chosen


def _greedy(
    values: Mapping[int, Sequence[float]], limit: int, *, stop: bool = False
) -> dict[int, int]:
    """Take items by value per cost.

    Args:
        stop: end at the first item that no longer fits, instead of passing it over.
    """
    items: list[tuple[float, int, int]] = []
    for cost, worth in values.items():
        items += [(-value / cost, index, cost) for index, value in enumerate(worth)]
    counts, left = dict.fromkeys(values, 0), limit
    for _, index, cost in sorted(items):
        # Only the next of its class may be taken, so that a class's items stay its leading ones.
        if cost <= left and index == counts[cost]:
            counts[cost] += 1
            left -= cost
        elif stop:
            break
    return counts


def _row(values: Sequence[float]) -> Tensor:
    """Return values as (n,) float64 on the CPU."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
