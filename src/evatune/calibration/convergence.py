"""The stop rule: directions and ranks have settled since about half the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evatune.calibration.config import CalibrationConfig
from evatune.capture import InputGroup, SharedInputs, TargetLayer
from evatune.errors import BudgetError
from evatune.ranks.allocation import Candidate, RankPlan, allocate, value_gained
from evatune.sketch.spectrum import Spectrum

# Two or three batches agree too easily, and the bound costs next to nothing.
MIN_BATCHES = 4


class Estimate(NamedTuple):
    """Shares of energy that the directions in use miss on fresh data, of what the best would hold.

    Attributes:
        missed: of each layer that there is something to compare with.
        mean: over these layers, weighted by their ranks; None without any. A single layer that
            learns slowly does not hold up the rest; it gets a status of its own. An expert weighs
            as its share of the tokens that the busiest expert got: otherwise an expert that no
            token reaches would keep the run from stopping.
        mean_of_all: the same over all layers, where those of which nothing is known miss all.
    """

    missed: dict[str, float]
    mean: float | None
    mean_of_all: float


class CheckedSpectra(NamedTuple):
    """The spectra of an earlier check, and its batches."""

    batches: int
    spectra: dict[InputGroup, Spectrum]


class ConvergenceMonitor:
    """Compares spectra, and the ranks they imply, with those of about half the data.

    Attributes:
        known: of the two last checks, the older one first: refreshes are so dense that one of them
            had about half the data of the next check.
        latest: what the last check found.
        settled: layers whose directions had settled by then.
    """

    def __init__(
        self,
        target_layers: Sequence[TargetLayer],
        shared_inputs: SharedInputs,
        config: CalibrationConfig,
        caps: Mapping[str, int],
    ) -> None:
        self._target_layers = target_layers
        self._shared_inputs = shared_inputs
        self._tolerance = config.tolerance
        self._redistribution = config.redistribution
        self._caps = caps
        self.known: list[CheckedSpectra] = []
        self.latest: Estimate | None = None
        self.settled: set[str] = set()

    def check(self, spectra: dict[InputGroup, Spectrum], batches: int) -> bool:
        """Return whether directions and ranks have both settled; remember these spectra."""
        self.latest = estimate = self._estimate(spectra, batches)
        directions_settled = estimate.mean_of_all < self._tolerance and batches >= MIN_BATCHES
        settled = directions_settled and self._missed_value(spectra, batches) < self._tolerance
        self.known = [*self.known[-1:], CheckedSpectra(batches, spectra)]
        self.settled = {name for name, share in estimate.missed.items() if share < self._tolerance}
        return settled

    def final_estimate(self, spectra: Mapping[InputGroup, Spectrum], batches: int) -> Estimate:
        """Return what the last check found, or what these spectra say if batches came after it."""
        is_current = self.latest is not None and self.known[-1].batches == batches
        return self.latest if is_current and self.latest else self._estimate(spectra, batches)

    def _estimate(self, spectra: Mapping[InputGroup, Spectrum], batches: int) -> Estimate:
        """Compare these spectra with those of the check that had about half the data."""
        half = self._known_at_half(batches)
        plan = self._trial_plan(spectra)
        shares = self._shares(spectra)
        weights: dict[str, float] = {}
        missed: dict[str, float] = {}
        of_groups: dict[InputGroup, list[float]] = {}
        for target_layer in self._target_layers:
            name = target_layer.name
            used = self._used_directions(name, plan)
            weights[name] = shares[name] * used
            group = self._shared_inputs.group_of(name)
            before = half.get(group) if group else None
            if group and before:
                if group not in of_groups:  # by several layers, at ranks of their own
                    of_groups[group] = estimated_missed(before, spectra[group])
                of_group = of_groups[group]
                if of_group:
                    missed[name] = of_group[min(used, len(of_group)) - 1]
        of_known = sum(weights[name] * share for name, share in missed.items())
        known = sum(weights[name] for name in missed)
        total = sum(weights.values())
        return Estimate(
            missed=missed,
            mean=of_known / known if known else None,
            mean_of_all=(of_known + total - known) / total if total else 1.0,
        )

    def _missed_value(self, spectra: Mapping[InputGroup, Spectrum], batches: int) -> float:
        """Return the share of these spectra's value that the ranks of about half the data miss.

        It is 1 where there is too little data for ranks, then or now.
        """
        before, now = self._trial_plan(self._known_at_half(batches)), self._trial_plan(spectra)
        if before is None or now is None:
            return 1.0
        return value_gained(self._candidates(spectra), before, now, self._caps)

    def _known_at_half(self, batches: int) -> Mapping[InputGroup, Spectrum]:
        """Return the spectra of the check whose batches are nearest to half of these, by ratio."""
        distances = [abs(math.log(2 * known.batches / batches)) for known in self.known]
        return self.known[distances.index(min(distances))].spectra if distances else {}

    def _candidates(self, spectra: Mapping[InputGroup, Spectrum]) -> dict[str, Candidate]:
        candidates = {}
        for target_layer in self._target_layers:
            group = self._shared_inputs.group_of(target_layer.name)
            if group is not None and group in spectra:
                candidates[target_layer.name] = Candidate(target_layer.spec, spectra[group])
        return candidates

    def _trial_plan(self, spectra: Mapping[InputGroup, Spectrum]) -> RankPlan | None:
        """Return the ranks that these spectra imply, or None while there is too little data."""
        candidates = self._candidates(spectra)
        try:
            return allocate(
                candidates,
                rank=self._redistribution.rank,
                rho=self._redistribution.rho,
                budget=self._redistribution.budget,
                metric=self._redistribution.metric,
                caps={name: cap for name, cap in self._caps.items() if name in candidates},
            )
        except BudgetError:
            return None

    def _used_directions(self, name: str, plan: RankPlan | None) -> int:
        """Return how many directions of a layer count: its rank, and at least one."""
        rank = self._redistribution.rank
        return max(1, rank if plan is None else plan.ranks.get(name, rank))

    def _shares(self, spectra: Mapping[InputGroup, Spectrum]) -> dict[str, float]:
        """Return the weight of each layer: 1, or an expert's rows over those of the busiest one."""
        rows = {}
        busiest: dict[str, int] = {}
        for target_layer in self._target_layers:
            group = self._shared_inputs.group_of(target_layer.name)
            rows[target_layer.name] = spectra[group].rows if group else 0
            rank_key = target_layer.spec.rank_key
            busiest[rank_key] = max(busiest.get(rank_key, 0), rows[target_layer.name])
        shares = dict.fromkeys(rows, 1.0)
        for target_layer in self._target_layers:
            if target_layer.expert is not None:
                most_rows = max(1, busiest[target_layer.spec.rank_key])
                shares[target_layer.name] = rows[target_layer.name] / most_rows
        return shares


def estimated_missed(before: Spectrum, now: Spectrum) -> list[float]:
    """Return the share of energy that the first 1, 2, … directions of `now` miss on fresh data.

    Of a moment C + E with sampling error E, the best directions are off by an angle that is linear
    in E, and miss energy that is quadratic in it: σ² / n with n rows. The first share w of the rows
    shares its errors with all of them, so on all rows its directions miss (1 - w) / w · σ² / n of
    what all rows' directions capture. So what half the data misses of the energies of all is, in
    expectation, what all miss of the truth. Texts and batches need not be known: rows that resemble
    each other enlarge both sides. A basis takes up what is new over several refreshes, and the
    energies of `now` favor its own directions, so the figure is somewhat low: in ten streams it was
    0.6 to 1.1 times the truth, 0.85 in the middle, and 0.3 to 1.6 times with heavy tails.

    Empty where no row came since, or none before.
    """
    fresh = now.rows - before.rows
    if fresh <= 0 or before.rows == 0:
        return []
    missed = missed_energy(before, now) * before.rows / fresh
    return missed.clamp(0, 1).tolist()


def missed_energy(before: Spectrum, now: Spectrum) -> Tensor:
    """Return the shares (≤ k,) of energy of `now`'s first 1, 2, … directions that `before`'s miss.

    Measured with the energies of `now`, of which `before` has not seen the latest rows. Unlike a
    cosine per vector it does not care how directions of equal energy rotate among themselves. Where
    `before` knows fewer directions, the last figure is for all that it has.
    """
    count = min(len(before.energies), len(now.energies))
    energies = now.energies.double()
    best = energies.cumsum(0)[:count]
    # Of each known direction, squared, along each new one. Float64 would differ by 1e-8, and take
    # ten times as long, for copies of the directions.
    overlap = (before.directions[:count] @ now.directions.T).double().square()
    captured = (overlap @ energies).cumsum(0)
    return torch.where(best > 0, 1 - captured / best, 0.0)


def is_due(before: int, now: int, is_point: Callable[[int], bool]) -> bool:
    """Return whether one of the points lies in (before, now]."""
    return any(is_point(batch) for batch in range(before + 1, now + 1))


def is_refresh(batch: int) -> bool:
    """Return whether sketches refresh, and the stop rule looks, after this batch.

    That is after 1, 2, 3, 4, 6, 8, 12, 16, 24, …: few enough to cost little, each a power step, and
    half of each is one of them too, the last but one before it.
    """
    return _is_power_of_two(batch) or (batch % 3 == 0 and _is_power_of_two(batch // 3))


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
