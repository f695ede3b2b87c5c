"""The grid of rates of the probe of starts: lines of runs in a file, and what is run next."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evatune.utils.json_lines import append_json_line, whole_lines

SEEDS = (0, 1, 2)
STEPS_PER_DECADE = 4  # of the grid of rates: ×1.78
MOST_POSITIONS = 13  # of the grid that a search may try

Losses = Mapping[tuple[int, int], float]  # (position, seed) → final validation loss, ∞ if diverged


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; what follows the last line break is of a killed run."""
    if not path.exists():
        return []
    return [json.loads(line) for line in whole_lines(path.read_text(encoding="utf-8"))]


def append_line(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    append_json_line(path, line)


def rate_at(position: int) -> float:
    return float(10 ** (position / STEPS_PER_DECADE))


def position_of(rate: float) -> int:
    return round(STEPS_PER_DECADE * math.log10(rate))


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the key of the job that made a line."""
    rate = f"{line['rate']:.4g}"
    return (line["task"], line["start"], line["rank"], line["alpha"], rate, line["seed"])


def diverged(curve: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a run ended in no number, or worse than it began."""
    first, last = curve[0]["loss"], curve[-1]["loss"]
    return bool(last is None or last > first)


def next_try(
    losses: Losses, center: int, *, spread: int = 3, stride: int = 1, seeds: Sequence[int] = SEEDS
) -> tuple[int, int] | None:
    """Return the position and seed that a search for the best rate tries next, or None at its end.

    First the first seed at `center` and `spread` positions on both sides; then beyond the edge
    while the best is at an edge, up to `MOST_POSITIONS` positions; then all seeds at the best and
    its two neighbors.
    """
    first = seeds[0]
    offsets = sorted(range(-spread, spread + 1), key=abs)
    for position in (center + stride * offset for offset in offsets):
        if (position, first) not in losses:
            return position, first
    tried = sorted(position for position, seed in losses if seed == first)
    best = best_position(losses, first)
    if len(tried) < MOST_POSITIONS:
        if best == tried[0]:
            return best - stride, first
        if best == tried[-1]:
            return best + stride, first
    for seed in seeds if len(seeds) > 1 else ():
        for position in neighborhood(losses, stride=stride, seeds=seeds):
            if (position, seed) not in losses:
                return position, seed
    return None


def best_position(losses: Losses, seed: int) -> int:
    """Return where a seed has the smallest loss; of equal ones the smallest rate."""
    tried = sorted(position for position, other in losses if other == seed)
    return min(tried, key=lambda position: losses[position, seed])


def neighborhood(losses: Losses, *, stride: int = 1, seeds: Sequence[int] = SEEDS) -> list[int]:
    """Return the best position of the first seed and its neighbors within what was tried."""
    tried = [position for position, seed in losses if seed == seeds[0]]
    best = best_position(losses, seeds[0])
    near = (best, best - stride, best + stride)
    return [position for position in near if min(tried) <= position <= max(tried)]


def chosen_position(losses: Losses, seeds: Sequence[int] = SEEDS) -> int | None:
    """Return which of the neighborhood has the smallest mean over seeds; None before its end."""
    if not any(seed == seeds[0] for _, seed in losses):
        return None
    near = neighborhood(losses, seeds=seeds)
    if any((position, seed) not in losses for position in near for seed in seeds):
        return None
    return min(near, key=lambda position: sum(losses[position, seed] for seed in seeds))


def losses_of(lines: Iterable[Mapping[str, Any]], **which: Any) -> dict[tuple[int, int], float]:
    """Return the final validation losses of lines with these values."""
    return {
        (position_of(line["rate"]), line["seed"]): final_loss(line)
        for line in select(lines, **which)
    }


def select(lines: Iterable[Mapping[str, Any]], **which: Any) -> list[Mapping[str, Any]]:
    return [line for line in lines if all(line[key] == value for key, value in which.items())]


def final_loss(line: Mapping[str, Any]) -> float:
    return math.inf if line["diverged"] else float(line["curve"][-1]["loss"])
