"""A knapsack whose items come in few costs: the exact search behind a parameter budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Cells that the exact search for a parameter budget may fill before it settles for the greedy
# answer.
_MAX_CELLS = 400_000_000


def _choose(values: Mapping[int, Sequence[float]], limit: int) -> dict[int, int]:
    """How many of the leading items of each cost class to take: most spend ≤ `limit`, then most
    value.

    A knapsack whose items come in few costs and, per cost, in descending order of value. Integer
    programs of this form have an optimum within 2Δ + 1 items of the one that fills the budget
    greedily by value per cost, Δ the largest cost in units of the greatest common divisor
    (Eisenbrand & Weismantel 2018, Proximity results and faster algorithms for integer programming
    using the Steinitz lemma), so the exact search need only look there.
    """
    unit = math.gcd(limit, *values) or 1
    greedy = _greedy(values, limit)
    if len(values) <= 1:
        return greedy
    centre = _greedy(values, limit, stop=True)
    reach = 2 * max(values) // unit + 2
    low = {cost: max(0, centre[cost] - reach) for cost in values}
    high = {cost: min(len(values[cost]), centre[cost] + reach) for cost in values}
    # The commonest step sizes first: with the rest of the classes last, the table keeps a coarse
    # unit.
    order = sorted(values, key=lambda cost: (high[cost] - low[cost], -cost), reverse=True)
    base = sum(low[cost] * cost for cost in values)
    budget = limit - base

    best, step = _row([0.0]), 0
    back: list[tuple[int, int, Tensor]] = []
    for position, cost in enumerate(order):
        prefix = _row([0.0, *values[cost]]).cumsum(0)[low[cost] : high[cost] + 1]
        grain = math.gcd(step, cost)
        span = min(budget, (len(best) - 1) * step + cost * (len(prefix) - 1))
        last = position == len(order) - 1
        size = 1 if last else span // grain + 1
        if size * len(prefix) > _MAX_CELLS:
            return greedy
        if last:
            return _finish(best, step, back, prefix, cost, budget, order, low, greedy)
        table = best.new_full((size,), -math.inf)
        choice = best.new_zeros(size, dtype=torch.int32)
        ratio = step // grain if step else 1
        source = best[: (span // step + 1)] if step else best
        for m, gain in enumerate(prefix.tolist()):
            start = m * cost // grain
            if start >= size:
                break
            room = min(len(source), (size - 1 - start) // ratio + 1)
            target = table[start : start + (room - 1) * ratio + 1 : ratio]
            candidate = source[:room] + gain
            better = candidate > target
            target.copy_(torch.where(better, candidate, target))
            picked = choice[start : start + (room - 1) * ratio + 1 : ratio]
            picked.masked_fill_(better, m)
        best, step = table, grain
        back.append((cost, grain, choice))
    raise AssertionError("unreachable: the loop returns at its last class")


def _finish(
    best: Tensor,
    step: int,
    back: list[tuple[int, int, Tensor]],
    prefix: Tensor,
    cost: int,
    budget: int,
    order: Sequence[int],
    low: Mapping[int, int],
    greedy: dict[int, int],
) -> dict[int, int]:
    """Try every count of the last class with the fullest table cell that still fits, and walk
    back."""
    cells = torch.arange(len(best), dtype=torch.int64, device=best.device)
    reachable = torch.where(torch.isfinite(best), cells, -1).cummax(0).values
    found: tuple[int, float, int, int] | None = None  # spend, value, count of the last class, cell
    for m, gain in enumerate(prefix.tolist()):
        rest = budget - m * cost
        if rest < 0:
            break
        cell = int(reachable[min(rest // step, len(best) - 1)])
        if cell < 0:
            continue
        spend, value = cell * step + m * cost, float(best[cell]) + gain
        if found is None or spend > found[0] or (spend == found[0] and value > found[1] + 1e-12):
            found = (spend, value, m, cell)
    if found is None:
        return greedy
    _, _, m, cell = found
    counts = {order[-1]: low[order[-1]] + m}
    total = cell * step
    for index in range(len(back) - 1, -1, -1):
        cost_here, grain, choice = back[index]
        m = int(choice[total // grain])
        counts[cost_here] = low[cost_here] + m
        total -= m * cost_here
    return counts


def _greedy(
    values: Mapping[int, Sequence[float]], limit: int, *, stop: bool = False
) -> dict[int, int]:
    """Take items by value per cost. What no longer fits is passed over, or with `stop` ends the
    filling."""
    items = sorted(
        (-value / cost, j, cost) for cost, worth in values.items() for j, value in enumerate(worth)
    )
    counts, left = dict.fromkeys(values, 0), limit
    for _, j, cost in items:
        # Only the next of its class may be taken, so that a class's items stay its leading ones.
        if cost <= left and j == counts[cost]:
            counts[cost] += 1
            left -= cost
        elif stop:
            break
    return counts


def _row(values: Sequence[float]) -> Tensor:
    """(n,) float64 on the CPU."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
