"""The search of a learning rate: which trials come next, and which rate is chosen.

Successive halving over seeds (Jamieson and Talwalkar 2016): one seed over a grid of rates, which
grows until the best of them lies inside, and downward while all of them end alike; the best three
with two more seeds; and the best of these with the seeds that are tested. What is compared is the
loss on validation examples after training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evatune.errors import ConfigError

STEPS_PER_DECADE = 4  # of the grid of rates
RATE_FACTOR = 10 ** (1 / STEPS_PER_DECADE)  # ×1.78
_SPREAD = 2  # positions on both sides of the recipe's rate, to begin with
_FINALISTS = 3
_MOST_POSITIONS = 13
_ALIKE = 0.03  # of the loss, within which no rate of a grid has learned more than another

Losses = Mapping[tuple[int, int], float]  # (position in the grid, seed) → loss, inf if diverged


@dataclass(frozen=True)
class Seeds:
    """The seeds that a rate is chosen with, and those that are tested with the chosen one."""

    tuning: tuple[int, ...] = (0, 1, 2)
    test: tuple[int, ...] = (10, 11, 12, 13, 14)

    def __post_init__(self) -> None:
        shared = sorted(set(self.tuning) & set(self.test))
        if shared:
            raise ConfigError(
                f"seeds to tune with and to test with share {', '.join(map(str, shared))}, so that"
                " what is tested would have been chosen by; give others to --seeds or --test-seeds"
            )
        if not self.tuning or not self.test:
            raise ConfigError(
                "a tuned comparison needs seeds to tune with and to test with, such as --seeds"
                " 0,1,2 --test-seeds 10,11,12,13,14"
            )


@dataclass(frozen=True)
class Trial:
    """One run of a search: a position in the grid of rates, a seed, and what it is for."""

    position: int
    seed: int
    tested: bool = False


def rate_at(position: int, center: float) -> float:
    """Return the learning rate at a position of the grid, which has the recipe's rate at 0."""
    return float(f"{center * 10 ** (position / STEPS_PER_DECADE):.4g}")


def positions(center: float) -> dict[float, int]:
    """Return the positions of all rates that a search may come to."""
    reach = range(-_MOST_POSITIONS, _MOST_POSITIONS + 1)
    return {rate_at(position, center): position for position in reach}


def next_trials(losses: Losses, seeds: Seeds) -> list[Trial]:
    """Return the trials that can be made now to go on with the search; none at its end.

    Args:
        losses: of the trials that have ended, those to test among them.
    """
    pending = _to_tune(losses, seeds)
    if pending:
        return pending
    position = chosen(losses, seeds)
    if position is None:
        return []
    tests = [Trial(position, seed, tested=True) for seed in seeds.test]
    return [trial for trial in tests if (trial.position, trial.seed) not in losses]


def chosen(losses: Losses, seeds: Seeds) -> int | None:
    """Return the position of the smallest mean loss over the tuning seeds; None before the end.

    It is None also where every trial has diverged.
    """
    return None if _to_tune(losses, seeds) else best_position(losses, seeds.tuning)


def _to_tune(losses: Losses, seeds: Seeds) -> list[Trial]:
    """Return the trials that can be made now to choose a position; none once it can be chosen."""
    first, *others = seeds.tuning
    wanted = _grid(losses, first)
    if not wanted:
        wanted = [(position, seed) for position in finalists(losses, first) for seed in others]
        wanted = [trial for trial in wanted if trial not in losses]
    if not wanted:
        wanted = [(edge, first) for edge in _beyond(losses, seeds)]
    return [Trial(*trial) for trial in wanted]


def _grid(losses: Losses, first: int) -> list[tuple[int, int]]:
    """Return what the first seed has to try: the grid, and beyond an edge that is the best."""
    grid = sorted(range(-_SPREAD, _SPREAD + 1), key=abs)
    wanted = [(position, first) for position in grid if (position, first) not in losses]
    if wanted:
        return wanted
    tried = _tried(losses, first)
    ordered = _ordered(losses, first)
    if len(tried) >= _MOST_POSITIONS:
        return []
    if not ordered or _are_alike([losses[position, first] for position in ordered]):
        # All diverged, or fell to what the model says without looking: too high, all of them.
        return [(tried[0] - 1, first), (tried[0] - 2, first)]
    if ordered[0] == tried[0]:
        return [(tried[0] - 1, first)]
    return [(tried[-1] + 1, first)] if ordered[0] == tried[-1] else []


def _are_alike(losses: Sequence[float]) -> bool:
    return max(losses) - min(losses) < _ALIKE * min(losses)


def finalists(losses: Losses, first: int) -> Sequence[int]:
    """Return the positions that the first seed leaves to the others, the best one first."""
    return _ordered(losses, first)[:_FINALISTS]


def best_position(losses: Losses, seeds: Sequence[int]) -> int | None:
    """Return the best finalist by its mean over all tuning seeds.

    None while no finalist has them all, or where each has diverged.

    Args:
        seeds: to tune with, that of the whole grid first.
    """
    sums = {}
    for position in finalists(losses, seeds[0]):
        trials = [(position, seed) for seed in seeds]
        if all(trial in losses for trial in trials):
            sums[position] = sum(losses[trial] for trial in trials)
    best = min(sums, key=sums.__getitem__, default=None)
    return None if best is None or math.isinf(sums[best]) else best


def _beyond(losses: Losses, seeds: Seeds) -> list[int]:
    """Return the position that is missing beside a best one at the edge of the grid."""
    tried = _tried(losses, seeds.tuning[0])
    best = best_position(losses, seeds.tuning)
    if best is None or len(tried) >= _MOST_POSITIONS:
        return []
    if best == tried[0]:
        return [tried[0] - 1]
    return [tried[-1] + 1] if best == tried[-1] else []


def _tried(losses: Losses, seed: int) -> list[int]:
    return sorted(position for position, other in losses if other == seed)


def _ordered(losses: Losses, seed: int) -> Sequence[int]:
    """Return the positions that did not diverge, best first; of equal ones the smallest rate."""
    finite = [position for position in _tried(losses, seed) if losses[position, seed] < math.inf]
    return sorted(finite, key=lambda position: losses[position, seed])
