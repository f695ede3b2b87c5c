"""A tuned comparison as values: cells of a method on a task, in groups of one condition.

Values by seed are of test seeds where nothing else is said; rates were chosen by others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, get_args

from evatune.finetune.comparison.curves import Convergence, KnownPoint, Point, mean_curve
from evatune.finetune.methods import METHODS
from evatune.finetune.methods.base import Role
from evatune.finetune.recipe import REFERENCE

FULL = "full"
LOWER_RATES = 2  # of the grid, next below LoRA's best

_ROLES = get_args(Role)

Values = dict[str, dict[str, dict[int, float | None]]]  # task → method → seed → value


@dataclass(frozen=True)
class RatePoint:
    """A learning rate of the search: what each tuning seed reached on validation examples."""

    rate: float
    losses: Mapping[int, float]  # by seed; infinite where the run diverged
    scores: Mapping[int, float]  # by seed; 0 where the run diverged

    @property
    def loss(self) -> float:
        return fmean(self.losses.values())

    @property
    def score(self) -> float:
        return fmean(self.scores.values())


@dataclass(frozen=True)
class Cell:
    """A method on a task, at the rate that validation chose.

    Values by seed are those of test seeds, at this rate; empty while there are none.

    Attributes:
        kappa: the factor by which the first step is larger than LoRA's at the same rate, the
            median over all runs. LoRA+'s larger rate of B is in it.
        tested_at_other_rates: runs that were tested at a rate which later ones showed not to be
            the best; nothing is made of them.
    """

    task: str
    method: str  # with settings that make it a method of its own: "eva (rho 1)"
    overrides: Mapping[str, Any] | None  # of the recipe; None where the recipe is not known
    recipe: str
    rates: tuple[RatePoint, ...]  # rising
    rate: float | None  # None where every rate diverged
    settled: bool  # whether three tuning seeds chose it
    scores: Mapping[int, float | None]  # on test examples; None where the run diverged
    losses: Mapping[int, float | None]  # on test examples
    curves: Mapping[int, tuple[Point, ...]]  # on validation examples
    steps: int  # of a run
    convergence: Convergence
    parameters: Mapping[int, int]
    init_seconds: float | None  # medians over the runs at this rate
    train_seconds: float | None
    peak_memory_bytes: float | None
    kappa: float | None
    participation: float | None
    ranks: Mapping[str, int] | None  # of the first test seed
    tested_at_other_rates: int = 0

    @property
    def inside(self) -> bool:
        """True if the chosen rate has worse rates on both sides."""
        return self.rate is not None and self.rates[0].rate < self.rate < self.rates[-1].rate

    @property
    def at_edge(self) -> bool:
        """True if the chosen rate is the smallest or the largest of several."""
        return self.rate is not None and len(self.rates) > 1 and not self.inside

    @property
    def validation_loss(self) -> float:
        """Mean final loss of the tuning seeds at the chosen rate; infinite where all diverged."""
        losses = self.tuning_losses.values()
        return fmean(losses) if losses else math.inf

    @property
    def tuning_losses(self) -> Mapping[int, float]:
        """Final validation losses at the chosen rate, by tuning seed; empty if all diverged."""
        return next((point.losses for point in self.rates if point.rate == self.rate), {})

    @property
    def score(self) -> float | None:
        """Mean test score; a run that diverged counts as 0."""
        return fmean(value or 0.0 for value in self.scores.values()) if self.scores else None

    @property
    def curve(self) -> list[KnownPoint]:
        """Mean validation loss and score over the seeds, at the steps that all of them have."""
        return mean_curve(list(self.curves.values()))


@dataclass(frozen=True)
class Group:
    """The cells of a domain under the same conditions: those of the recipes, or another rank."""

    domain: str
    condition: str  # "" for the settings of the recipes
    cells: tuple[Cell, ...]
    tuning_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @cached_property
    def methods(self) -> list[str]:
        return sorted({cell.method for cell in self.cells}, key=method_order)

    def cell(self, task: str, method: str) -> Cell | None:
        return self._by_place.get((task, method))

    def of(self, method: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.method == method]

    def cells_on(self, task: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.task == task]

    def test_scores(self) -> Values:
        """Return test scores; None where the run diverged."""
        return self._values(lambda cell: dict(cell.scores))

    def steps_saved(self) -> Values:
        """Return by which share of a run methods are before LoRA; see `sooner_by`."""
        return self._values(lambda cell: dict(cell.convergence.sooner))

    def area_saved(self) -> Values:
        """Return each run's mean progress toward LoRA's final validation loss.

        It is a share of LoRA's improvement, and the mean is over the steps.
        """

        def saved(cell: Cell) -> dict[int, float | None]:
            return {seed: 1 - area for seed, area in cell.convergence.area.items()}

        return self._values(saved)

    def gained_at_lower_rates(self) -> Values:
        """Return what methods gain at rates below LoRA's best, over what LoRA gains at its best.

        A gain is the fall of the validation loss in training, 0 where the run diverged; the mean
        over `LOWER_RATES` rates, by tuning seed. Methods that lack one of the rates are left out.
        """
        return self._values(lambda cell: _gains_below(cell, self.cell(cell.task, REFERENCE)))

    def gained_over_rates(self) -> Values:
        """Return by how much methods are above LoRA in validation score at the same rate.

        It is the mean over the rates that both have run, by tuning seed: what to expect at a rate
        that nobody chose. A run that diverged counts as 0.
        """
        return self._values(lambda cell: _gains_over(cell, self.cell(cell.task, REFERENCE)))

    def parameters_saved(self) -> Values:
        """Return by which share of LoRA's trainable parameters a method has fewer."""

        def saved(cell: Cell) -> dict[int, float | None]:
            reference = self.cell(cell.task, REFERENCE)
            of_reference = reference.parameters if reference else {}
            return {
                seed: 1 - count / of_reference[seed]
                for seed, count in cell.parameters.items()
                if of_reference.get(seed)
            }

        return self._values(saved)

    @cached_property
    def _by_place(self) -> dict[tuple[str, str], Cell]:
        return {(cell.task, cell.method): cell for cell in self.cells}

    def _values(self, of: Callable[[Cell], dict[int, float | None]]) -> Values:
        values: Values = {task: {} for task in self.tasks}
        for cell in self.cells:
            by_seed = of(cell)
            if by_seed:
                values[cell.task][cell.method] = by_seed
        return values


@dataclass(frozen=True)
class TunedSummary:
    """A tuned comparison, domain by domain."""

    groups: tuple[Group, ...]
    runs: int

    @property
    def methods(self) -> list[str]:
        return sorted({name for group in self.groups for name in group.methods}, key=method_order)

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(group.domain for group in self.groups))


def base_name(method: str) -> str:
    """Return a method's name in recipes: that of "eva (rho 1)" is "eva"."""
    return method.split(" ")[0]


def method_order(name: str) -> tuple[int, int, str]:
    """Return where a method stands among others: references, EVA, competitors, controls."""
    base = base_name(name)
    known = METHODS.get(base)
    if known is None:  # one that is no longer registered
        return (len(_ROLES), 0, name)
    return (_ROLES.index(known.role), list(METHODS).index(base), name)


def _gains_over(cell: Cell, reference: Cell | None) -> dict[int, float | None]:
    of_reference = {point.rate: point.scores for point in reference.rates} if reference else {}
    shared = [
        (point.scores, of_reference[point.rate])
        for point in cell.rates
        if point.rate in of_reference
    ]
    if len(shared) < 2:
        return {}
    seeds = sorted(set.intersection(*(set(one) & set(other) for one, other in shared)))
    return {seed: fmean(one[seed] - other[seed] for one, other in shared) for seed in seeds}


def _gains_below(cell: Cell, reference: Cell | None) -> dict[int, float | None]:
    if reference is None or not reference.curve:
        return {}
    start, end = reference.curve[0][1], reference.curve[-1][1]
    best = reference.rate or 0.0
    lower = [point.rate for point in reference.rates if point.rate < best][-LOWER_RATES:]
    losses = [point.losses for point in cell.rates if point.rate in lower]
    if len(losses) < LOWER_RATES or start <= end:
        return {}
    seeds = sorted(set.intersection(*map(set, losses)))
    gains: dict[int, float | None] = {}
    for seed in seeds:
        gained = fmean(max(0.0, start - by_seed[seed]) for by_seed in losses)
        gains[seed] = gained / (start - end)
    return gains
