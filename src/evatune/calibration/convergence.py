"""The stop rule: directions and ranks have settled since the last check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evatune.calibration.config import CalibrationConfig
from evatune.capture import InputGroup, SharedInputs, TargetLayer
from evatune.errors import BudgetError
from evatune.ranks.allocation import Candidate, RankPlan, allocate, rank_shift
from evatune.sketch.spectrum import Spectrum

# Two or three batches agree too easily, and the bound costs next to nothing.
MIN_BATCHES = 4


class ConvergenceMonitor:
    """Compares spectra and the ranks they imply with those of the check before.

    Attributes:
        spectra: of the last check.
        plan: the ranks that they imply; None while there is too little data for any.
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
        self.spectra: dict[InputGroup, Spectrum] = {}
        self.plan: RankPlan | None = None
        self.settled: set[str] = set()

    def check(self, spectra: dict[InputGroup, Spectrum], batches: int) -> bool:
        """Return whether directions and ranks have both settled since the last check.

        Directions: the mean over layers, weighted by their ranks, of what the previous directions
        miss. A single layer that learns slowly does not hold up the rest; it gets a status of its
        own. An expert weighs as its share of the tokens that the busiest expert got: one that none
        reach settles never. Ranks: twice the tolerance, since ranks move between components of
        nearly equal worth.
        """
        tolerance = self._tolerance
        if tolerance == 0:
            return False
        plan = self._trial_plan(spectra)
        shares = self._shares(spectra)
        missed, weight = 0.0, 0.0
        self.settled = set()
        for target_layer in self._target_layers:
            used = self._used_directions(target_layer.name, plan)
            gap = self._missed(target_layer.name, spectra, used)
            missed += shares[target_layer.name] * used * gap
            weight += shares[target_layer.name] * used
            if gap <= tolerance:
                self.settled.add(target_layer.name)
        moved = rank_shift(self.plan, plan) if self.plan and plan else 1.0
        self.spectra, self.plan = spectra, plan
        directions_settled = missed <= tolerance * weight
        return batches >= MIN_BATCHES and directions_settled and moved <= 2 * tolerance

    def _trial_plan(self, spectra: Mapping[InputGroup, Spectrum]) -> RankPlan | None:
        """Return the ranks that these spectra imply, or None while there is too little data."""
        candidates = {}
        for target_layer in self._target_layers:
            group = self._shared_inputs.group_of(target_layer.name)
            if group is not None:
                candidates[target_layer.name] = Candidate(target_layer.spec, spectra[group])
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
                most = max(1, busiest[target_layer.spec.rank_key])
                shares[target_layer.name] = rows[target_layer.name] / most
        return shares

    def _missed(self, name: str, spectra: Mapping[InputGroup, Spectrum], used: int) -> float:
        """Return the share of energy that the directions of the last check miss; 1 without any."""
        group = self._shared_inputs.group_of(name)
        before = self.spectra.get(group) if group else None
        return missed_energy(before, spectra[group], used) if group and before else 1.0


def missed_energy(before: Spectrum, now: Spectrum, used: int) -> float:
    """Return the share of energy in the `used` leading directions of `now` that `before` misses.

    Measured with the energies of `now`, of which `before` has not seen the latest rows. Unlike a
    cosine per vector it does not care how directions of equal energy rotate among themselves.
    """
    used = min(used, len(before.energies), len(now.energies))
    energies = now.energies.double()
    best = float(energies[:used].sum())
    if used == 0 or best <= 0:
        return 0.0
    # (k,) share of each new direction
    overlap = (before.directions[:used] @ now.directions.T).square().sum(0)
    return 1 - float((overlap * energies).sum()) / best


def is_due(before: int, now: int, is_point: Callable[[int], bool]) -> bool:
    """Return whether one of the points lies in (before, now]."""
    return any(is_point(batch) for batch in range(before + 1, now + 1))


def is_check(batch: int) -> bool:
    """Return whether the stop rule looks after this batch: 1, 2, 4, 8, …

    So it compares with what half the data said.
    """
    return batch & (batch - 1) == 0


def is_refresh(batch: int) -> bool:
    """Return whether sketches refresh after this batch: at each check and halfway to the next.

    Halfway from 6 on. That is few enough to cost little, and each is a power step.
    """
    return is_check(batch) or (batch > 3 and batch % 3 == 0 and is_check(batch // 3))
