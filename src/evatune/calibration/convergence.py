"""Watches the sketches while batches come: bad rows, when to stop, and the verdict per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.result import CalibratedLayer, Calibration
from evatune.calibration.status import Status, shortage
from evatune.capture import InputGroup, SharedInputs, TargetLayer
from evatune.distributed.group import ProcessGroup
from evatune.distributed.sketches import DistributedSketches
from evatune.errors import BudgetError
from evatune.modeling.fingerprint import fingerprint
from evatune.modeling.wrappers import describe
from evatune.ranks.allocation import Candidate, RankPlan, allocate, rank_shift
from evatune.sketch import Sketch, refresh_all
from evatune.sketch.spectrum import Spectrum, empty

# Two or three batches agree too easily, and the bound costs next to nothing.
_MIN_BATCHES = 4


# Share of the energy by which fresh rows may fall short of what the rows before them had shown. In
# mixed streams of single texts it is up to 0.06, of batches of four up to 0.04; where news turn
# into code, up to 0.22.
_DRIFT = 0.07


class Monitor:
    """Watches the sketches, those of all processes: bad rows, the stop rule, and the verdict per
    layer."""

    def __init__(
        self,
        target_layers: list[TargetLayer],
        shared_inputs: SharedInputs,
        config: CalibrationConfig,
        process_group: ProcessGroup,
        make: Callable[[str], Sketch],
        caps: Mapping[str, int],
    ) -> None:
        self._target_layers = target_layers
        self._shared_inputs = shared_inputs
        self._config = config
        self._process_group = process_group
        self._make = make
        self._caps = caps
        self._joint = DistributedSketches(
            process_group,
            shared_inputs,
            [target_layer.name for target_layer in target_layers],
            make,
        )
        self._latest: dict[InputGroup, Spectrum] = {}  # of the last refresh
        self._spectra: dict[InputGroup, Spectrum] = {}  # of the last check
        self._plan: RankPlan | None = None
        self._weights: dict[str, str] = {}  # by name, their hashes, once somebody asked
        # layer → first batch with NaN or Inf, and its process
        self._bad: dict[str, tuple[int, int]] = {}
        self.batches = 0  # of all processes, as of the last meeting
        self.more = True  # whether any process may have more of them
        self.settled: set[str] = set()
        self._drifting: set[str] = set()  # layers
        self.rows = 0

    def note_nonfinite_rows(self, batch: int) -> None:
        """Find NaN and Inf, with one wait for the device per batch (and device), however many
        layers there are."""
        by_device: dict[torch.device, list[InputGroup]] = {}
        for group in self._shared_inputs.groups:
            by_device.setdefault(group.sketch.device, []).append(group)
        for groups in by_device.values():
            finite = torch.stack([group.sketch.finite for group in groups]).tolist()
            for group in (g for g, good in zip(groups, finite, strict=True) if not good):
                for name in group.members:
                    self._bad.setdefault(name, (batch, self._process_group.rank))
                    self._shared_inputs.stop_watching(name)

    def synchronize(self, batches: int, more: bool) -> None:
        """Tell the others of this process's batches so far, if there may be more, and what was bad;
        and hear of theirs."""
        everyone = self._process_group.gather({"batches": batches, "open": more, "bad": self._bad})
        self.batches = sum(said["batches"] for said in everyone)
        found = [(name, tuple(place)) for said in everyone for name, place in said["bad"].items()]
        # the first batch is the one that stays
        self._bad = dict(sorted(found, key=lambda entry: entry[1], reverse=True))
        for name in self._bad:
            self._shared_inputs.stop_watching(name)
        self.more = any(said["open"] for said in everyone)

    def refresh(self) -> None:
        """Move every sketch's basis to what the data so far suggests."""
        before = self._latest
        if self._process_group.size > 1:
            self._latest = self._joint.refresh()
        else:
            groups = self._shared_inputs.groups
            self._latest = dict(
                zip(groups, refresh_all([group.sketch for group in groups]), strict=True)
            )
        for group, spectrum in self._latest.items():
            self._note_drift(group, before.get(group), spectrum, self.batches)
        self.rows = max((spectrum.rows for spectrum in self._latest.values()), default=0)

    def check(self) -> bool:
        """After a refresh: true when directions and ranks have both settled since the last check.

        Directions: the mean over layers, weighted by their ranks, of what the previous directions
        miss. A single layer that learns slowly does not hold up the rest; it gets a status of its
        own. An expert weighs as its share of the tokens that the busiest expert got: one that none
        reach settles never. Ranks: twice the tolerance, since ranks move between components of
        nearly equal worth.
        """
        spectra, tolerance = self._latest, self._config.tolerance
        if tolerance == 0:
            return False
        plan = self._trial_plan(spectra)
        missed, weight = 0.0, 0.0
        self.settled = set()
        busiest: dict[str, int] = {}
        for target_layer in self._target_layers:
            group = self._shared_inputs.group_of(target_layer.name)
            rank_key = target_layer.spec.rank_key
            busiest[rank_key] = max(busiest.get(rank_key, 0), spectra[group].rows if group else 0)
        for target_layer in self._target_layers:
            group = self._shared_inputs.group_of(target_layer.name)
            before = self._spectra.get(group) if group else None
            used = max(
                1,
                (
                    plan.ranks[target_layer.name]
                    if plan and target_layer.name in plan.ranks
                    else self._config.rank_or_default
                ),
            )
            gap = _missed(before, spectra[group], used) if group and before else 1.0
            share = 1.0
            if target_layer.expert is not None:
                share = (
                    spectra[group].rows / max(1, busiest[target_layer.spec.rank_key])
                    if group
                    else 0.0
                )
            missed, weight = missed + share * used * gap, weight + share * used
            if gap <= tolerance:
                self.settled.add(target_layer.name)
        moved = rank_shift(self._plan, plan) if self._plan and plan else 1.0
        self._spectra, self._plan = spectra, plan
        return (
            self.batches >= _MIN_BATCHES and missed <= tolerance * weight and moved <= 2 * tolerance
        )

    def result(self, ended: Status, batches: int, model: nn.Module) -> Calibration:
        spectra, status, layers = {}, {}, {}
        # Numbered by the order of the layers, which all processes have in common.
        groups = dict.fromkeys(
            group
            for target_layer in self._target_layers
            if (group := self._shared_inputs.group_of(target_layer.name))
        )
        answers = {group: self._answer(group) for group in groups}
        for group, spectrum in answers.items():
            self._note_drift(group, self._latest.get(group), spectrum, batches)
        number = {group: index for index, group in enumerate(groups)}
        for target_layer in self._target_layers:
            group = self._shared_inputs.group_of(target_layer.name)
            spectrum = (
                answers[group] if group else empty(target_layer.in_features, self._config.center)
            )
            spectra[target_layer.name] = spectrum
            status[target_layer.name] = self._verdict(target_layer, spectrum, ended)
            bad = self._bad.get(target_layer.name)
            layers[target_layer.name] = CalibratedLayer(
                target_layer.spec,
                input=number[group] if group else None,
                first_bad_batch=bad[0] if bad else None,
                bad_process=bad[1] if bad and self._process_group.size > 1 else None,
            )
        return Calibration(
            spectra=spectra,
            status=status,
            layers=layers,
            config=self._config,
            batches=batches,
            model=describe(model),
            processes=self._process_group.size,
            bytes_sent=self._process_group.bytes_sent,
        )

    def identity(self, model: nn.Module) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit, and on every process."""
        specs = [target_layer.spec for target_layer in self._target_layers]
        layers = {
            spec.name: [spec.in_features, spec.out_features, spec.groups, spec.rank_group]
            for spec in specs
        }
        known = {
            "model": describe(model),
            "layers": layers,
            "config": asdict(self._config),
            "caps": dict(self._caps),
        }
        self._weights = self._weights or fingerprint(model)  # they stay as they are meanwhile
        return known | {"weights": self._weights}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the loop has found so far, as named tensors and JSON."""
        tensors: dict[str, Tensor] = {}
        for place, group in enumerate(self._shared_inputs.groups):
            parts = {"sketch": group.sketch.state()}
            parts |= {
                key: found[group].state() for key, found in self._found().items() if group in found
            }
            tensors |= {
                f"{place}.{key}.{name}": t
                for key, sublayer in parts.items()
                for name, t in sublayer.items()
            }
        members = [group.members for group in self._shared_inputs.groups]
        plan = asdict(self._plan) if self._plan is not None else None
        return tensors, {
            "groups": members,
            "bad": self._bad,
            "settled": sorted(self.settled),
            "drifting": sorted(self._drifting),
            "plan": plan,
        }

    def set_state(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, key, sublayer = name.split(".", 2)
            parts.setdefault(f"{place}.{key}", {})[sublayer] = tensor
        for number, group in enumerate(self._shared_inputs.arrange(record["groups"], self._make)):
            group.sketch.set_state(parts[f"{number}.sketch"])
            for key, found in self._found().items():
                if f"{number}.{key}" in parts:
                    found[group] = Spectrum.of_state(parts[f"{number}.{key}"])
        self._bad = {name: tuple(place) for name, place in record["bad"].items()}
        for name in self._bad:
            self._shared_inputs.stop_watching(name)
        self.settled, self._drifting = set(record["settled"]), set(record["drifting"])
        self._plan = RankPlan(**record["plan"]) if record["plan"] is not None else None
        self.rows = max((spectrum.rows for spectrum in self._latest.values()), default=0)

    def _found(self) -> dict[str, dict[InputGroup, Spectrum]]:
        return {"latest": self._latest, "check": self._spectra}

    def _answer(self, group: InputGroup) -> Spectrum:
        """The group's spectrum: the last refresh's, if no row came after it."""
        known = self._latest.get(group)
        if known is not None and (self._process_group.size > 1 or known.rows == group.sketch.count):
            return known
        return group.sketch.spectrum()

    def _note_drift(
        self, group: InputGroup, before: Spectrum | None, now: Spectrum, batches: int
    ) -> None:
        """Remember layers whose newest rows are captured worse than the rows before them were.

        Either share is of directions that had not seen the rows. In mixed data it rises, or stays
        to chance.
        """
        known, fresh = before and before.certificate, now.certificate
        if batches <= _MIN_BATCHES or not known or not fresh:
            return
        enough = min(known.rows, fresh.rows) >= self._config.kept
        if enough and known.captured() - fresh.captured() > _DRIFT:
            self._drifting.update(group.members)

    def _verdict(self, target_layer: TargetLayer, spectrum: Spectrum, ended: Status) -> Status:
        if target_layer.name in self._bad:
            return Status.NON_FINITE
        lack: Status | None = Status.NEVER_CALLED
        if self._shared_inputs.group_of(target_layer.name) is not None:
            needed = min(self._config.kept, target_layer.in_features, target_layer.out_features)
            lack = shortage(spectrum.rows, spectrum.total_energy, needed)
        if lack is not None:
            others = (
                other.name
                for other in self._target_layers
                if other.spec.rank_key == target_layer.spec.rank_key
            )
            routed = target_layer.expert is not None and any(
                self._shared_inputs.group_of(name) for name in others
            )
            return Status.SELDOM_ROUTED if routed else lack
        if target_layer.name in self._drifting:
            return Status.DRIFTING
        if target_layer.name in self.settled:
            return Status.CONVERGED
        return Status.UNSETTLED if ended is Status.CONVERGED else ended

    def _trial_plan(self, spectra: dict[InputGroup, Spectrum]) -> RankPlan | None:
        """The ranks that today's spectra imply, or None while there is too little data for any."""
        config = self._config
        candidates = {}
        for target_layer in self._target_layers:
            group = self._shared_inputs.group_of(target_layer.name)
            if group is not None:
                candidates[target_layer.name] = Candidate(target_layer.spec, spectra[group])
        try:
            return allocate(
                candidates,
                rank=config.rank_or_default,
                rho=config.rho_or_default,
                budget=config.budget,
                metric=config.metric,
                caps={name: cap for name, cap in self._caps.items() if name in candidates},
            )
        except BudgetError:
            return None


def _missed(before: Spectrum, now: Spectrum, used: int) -> float:
    """Share of the energy in the `used` leading directions of `now` that those of `before` do not
    reach.

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
    """Whether one of the points lies in (before, now]."""
    return any(is_point(batch) for batch in range(before + 1, now + 1))


def is_check(batch: int) -> bool:
    """1, 2, 4, 8, …: the stop rule compares with what half the data said."""
    return batch & (batch - 1) == 0


def is_refresh(batch: int) -> bool:
    """At each check and, from 6 on, halfway to the next: few enough to cost little, and each is a
    power step."""
    return is_check(batch) or (batch > 3 and batch % 3 == 0 and is_check(batch // 3))
