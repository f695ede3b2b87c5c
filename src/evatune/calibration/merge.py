"""Calibrations of one model on separate shards of the data, joined from their records alone.

Per layer, a merge has the leading directions of Σ nᵢKᵢ / N, where shard i has nᵢ of the N rows and
Kᵢ is what its record keeps of their second moment Cᵢ. Centered records join about the common mean.

What that can lose. No sketch reports what its data does not hold: Cᵢ = Kᵢ + Rᵢ with Rᵢ ⪰ 0, and
tr Rᵢ is the energy outside the shard's directions, its `tail_energy`. Let T = Σ nᵢ·tr Rᵢ / N. By
Weyl's and Ky Fan's inequalities, for every r and per row,

    best_r - T  ≤  Σ_{j≤r} energies_j  ≤  captured_r  ≤  best_r

up to rounding, where best_r is the energy that the r best directions for all the data capture of
it, and captured_r what the first r merged ones do. T is nearly reached where every shard drops one
and the same direction, and 0 where the data of every shard has a rank of at most k.

Where each shard's directions are the best for its own data, as with `sketch="exact"`, Rᵢ ⪯
fᵢ(I - Pᵢ), with fᵢ the shard's smallest kept energy and Pᵢ the projection on its directions. Then
Σ nᵢCᵢ / N ⪯ L + f·I, with f = Σ nᵢfᵢ / N and L the merge of the shards with their energies lowered
by fᵢ, and T may be replaced by

    D_r = Σ_{j≤r} (λ_j(L) + f - energies_j)  ≤  r·f

which is 0 where all shards agree on their directions. `loss_bounds` has the figures of a merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from evatune.calibration.data import CalibratedLayer, CalibrationData
from evatune.calibration.status import Status, shortage
from evatune.errors import ConfigError
from evatune.sketch import SKETCHES
from evatune.sketch.low_rank import SecondMoment
from evatune.sketch.spectrum import (
    Certificate,
    InputMoments,
    Spectrum,
    as_energies,
    empty,
    fix_signs,
)
from evatune.utils.text import shortened

Data = TypeVar("Data", bound=CalibrationData)

# Amplitudes below this share of the largest are rounding of the records' float32 directions.
_RTOL = 1e-7

# From settled to not; a shard that could settle nothing counts as one whose data ended.
_LEAST_SETTLED_LAST = (
    Status.CONVERGED,
    Status.UNSETTLED,
    Status.MAX_BATCHES,
    Status.DATA_EXHAUSTED,
    Status.DRIFTING,
)

# How far a shard ran and where its sketch started; everything else says what its numbers mean.
_MAY_DIFFER = ("max_batches", "seed", "distributed", "rendezvous_timeout")


def merge_calibrations(shards: Sequence[Data]) -> Data:
    """Join calibrations of one model; see `Calibration.merge`."""
    shards = list(shards)
    if len(shards) < 2:
        raise ConfigError(
            f"merge got {len(shards)} calibrations; it joins two or more of the same model"
        )
    first = shards[0]
    if first.config.objective == "regression":
        raise ConfigError(
            "calibrations with objective='regression' cannot be joined, since their records do not"
            " keep the mean gradient; calibrate on all the data at once, on several processes if"
            " there are any"
        )
    for number, other in enumerate(shards[1:], start=2):
        _require_same(first, other, number)
    spectra, status, layers = {}, {}, {}
    joined: dict[tuple[int | None, ...], tuple[int, Spectrum]] = {}
    for name, layer in first.layers.items():
        status[name] = _certain_end(shards, name)
        inputs = tuple(shard.layers[name].input for shard in shards)
        if set(inputs) == {None} or status[name] is Status.NON_FINITE:
            spectra[name] = empty(layer.in_features, first.config.center)
            bad_batch = _first_bad_batch(shards, name)
            layers[name] = replace(
                layer, input=None, first_bad_batch=bad_batch, estimated_missed=None
            )
            continue
        if inputs not in joined:  # layers that share an input in every shard still share it
            spectrum = merge_spectra(_parts(shards, name), first.config.n_components)
            joined[inputs] = len(joined), spectrum
        number, spectra[name] = joined[inputs]
        layers[name] = replace(layer, input=number, estimated_missed=None)
        needed = min(first.config.n_components, layer.spec.max_rank)
        lack = shortage(spectra[name].rows, spectra[name].total_energy, needed)
        status[name] = _joint_end(status[name], lack)
    return replace(
        first,
        spectra=spectra,
        status=status,
        layers=layers,
        config=replace(
            first.config,
            max_batches=sum(shard.config.max_batches for shard in shards),
            seed=min(shard.config.seed for shard in shards),
        ),
        batches=sum(shard.batches for shard in shards),
        estimated_missed=None,
        versions=_joint_versions(shards),
    )


def merge_spectra(parts: Sequence[Spectrum], components: int) -> Spectrum:
    """Return the `components` leading eigenpairs of what the parts hold, with exact totals.

    Args:
        parts: at least one spectrum, of one width, all centered or none. Those without rows do not
            count.
        components: how many directions to keep at most.

    Returns:
        A spectrum whose certificate rests on rows that had no part in its directions: those of one
        half of the parts, seen by the directions of the other half, the one with more rows.

    For what the directions can lose see the top of this module. Sums are float64. The order of
    parts changes rounding only. Cost: O(d·(m·k)²) for m parts of k directions, m·k ≤ d, and
    16·m·k·d bytes.
    """
    if not any(part.rows for part in parts):
        return parts[0]
    parts = sorted(
        (part for part in parts if part.rows),
        key=lambda p: (p.rows, p.total_energy, p.energies.tolist()),
    )
    with_energy = [part for part in parts if part.total_energy > 0]
    merged = _join(parts, components)
    if len(with_energy) > 1:
        return replace(merged, certificate=_cross_check(with_energy, components))
    return replace(merged, certificate=with_energy[0].certificate if with_energy else None)


class LossBound(NamedTuple):
    """Bounds for the share of energy that merged directions have lost against one pass."""

    proven: float  # whatever the sketches found
    # if each shard's directions are the best for its own data, as the exact sketch's are
    given_best: float


def loss_bounds(
    merged: CalibrationData, shards: Sequence[CalibrationData], ranks: Mapping[str, int]
) -> dict[str, LossBound]:
    """Return by layer the bounds for its first `ranks[name]` directions.

    They are derived at the top of this module.
    """
    losses: dict[int | None, tuple[float, Tensor]] = {}
    bounds = {}
    for name, spectrum in merged.spectra.items():
        number, rank = merged.layers[name].input, ranks[name]
        if rank == 0 or spectrum.total_energy == 0:
            bounds[name] = LossBound(0.0, 0.0)
            continue
        if number not in losses:
            parts = [part for part in _parts(shards, name) if part.rows]
            losses[number] = _losses(spectrum, parts, merged.config.n_components)
        outside, by_rank = losses[number]
        given_best = min(outside, float(by_rank[:rank][-1])) / spectrum.total_energy
        proven = (
            given_best
            if SKETCHES[merged.config.sketch].optimal
            else outside / spectrum.total_energy
        )
        bounds[name] = LossBound(proven, given_best)
    return bounds


def _losses(merged: Spectrum, parts: Sequence[Spectrum], components: int) -> tuple[float, Tensor]:
    """Return T and, for r = 1 … k, D_r, per row; both are defined at the top of this module."""
    weights = [part.rows / merged.rows for part in parts]
    outside = sum(weight * part.tail_energy for weight, part in zip(weights, parts, strict=True))
    # Fewer directions than were asked for: there is no energy in any other.
    full = [len(part.energies) == min(components, part.directions.shape[1]) for part in parts]
    floors = [
        float(part.energies[-1]) if whole else 0.0 for part, whole in zip(parts, full, strict=True)
    ]
    lowered = [
        replace(part, energies=part.energies - floor)
        for part, floor in zip(parts, floors, strict=True)
    ]
    about = merged.mean.double()
    factor = torch.cat(
        [weight**0.5 * _factor(part, about) for weight, part in zip(weights, lowered, strict=True)]
    )
    upper = about.new_zeros(len(merged.energies))
    largest = torch.linalg.svdvals(factor).square()[: len(upper)]
    upper[: len(largest)] = largest
    upper += sum(weight * floor for weight, floor in zip(weights, floors, strict=True))
    return outside, (upper - merged.energies.double()).cumsum(0).clamp_min(0)


def _join(parts: Sequence[Spectrum], components: int) -> Spectrum:
    """Return the leading directions of all parts, without a certificate."""
    rows = sum(part.rows for part in parts)
    weights = torch.tensor([part.rows / rows for part in parts], dtype=torch.float64, device="cpu")
    mean = weights @ torch.stack([part.mean.double() for part in parts])
    factor = torch.cat(
        [weight.sqrt() * _factor(part, mean) for weight, part in zip(weights, parts, strict=True)]
    )
    _, singular, right = torch.linalg.svd(factor, full_matrices=False)
    leading = (singular > singular[:1] * _RTOL).nonzero().flatten()[:components]
    directions = fix_signs(right[leading].float()).contiguous()
    return Spectrum(
        directions=directions,
        energies=as_energies(singular[leading].square()),
        total_energy=sum(
            float(w) * _total_about(part, mean) for w, part in zip(weights, parts, strict=True)
        ),
        rows=rows,
        mean=mean.float(),
        centered=parts[0].centered,
        inputs=_join_inputs(parts, weights, directions.double()),
    )


def _join_inputs(
    parts: Sequence[Spectrum], weights: Tensor, directions: Tensor
) -> InputMoments | None:
    """Return the inputs' moments along joined directions (k, d), where records have gradients.

    Each record knows them along its own directions; between those, and outside, they are taken as
    evenly spread.
    """
    along, total = torch.zeros_like(directions[:, 0]), 0.0
    for part, weight in zip(parts, weights, strict=True):
        if part.inputs is None:
            return None
        trace = torch.tensor(part.inputs.total, dtype=torch.float64, device="cpu")
        moment = SecondMoment.of_eigenpairs(
            part.directions.double(), part.inputs.along.double(), trace
        )
        along += weight * moment.along(directions)
        total += float(weight) * part.inputs.total
    return InputMoments(as_energies(along), total)


def _factor(part: Spectrum, about: Tensor) -> Tensor:
    """Return F (≤ k + 1, d) float64 with FᵀF the recorded second moment per row.

    About the row `about` when centering.
    """
    factor = part.energies.double().clamp_min(0).sqrt()[:, None] * part.directions.double()
    if not part.centered:
        return factor
    return torch.cat([factor, (part.mean.double() - about)[None]])


def _total_about(part: Spectrum, about: Tensor) -> float:
    """Return the mean squared norm per row; about the row `about` when centering."""
    if not part.centered:
        return part.total_energy
    return part.total_energy + float((part.mean.double() - about).square().sum())


def _cross_check(parts: Sequence[Spectrum], components: int) -> Certificate:
    """Return what the directions of half the parts capture of the other half's rows.

    What a part dropped cannot be measured and counts as missed, so the figure errs on the low side
    only. The shards' own certificates are of no use here: they are about directions that the merge
    has changed.
    """
    known, fresh = sorted(
        (parts[::2], parts[1::2]), key=lambda half: sum(part.rows for part in half), reverse=True
    )
    joined = _join(known, components)
    rows = sum(part.rows for part in fresh)
    about = joined.mean.double()
    energies, total = about.new_zeros(len(joined.energies)), 0.0
    for part in fresh:
        weight = part.rows / rows
        energies += weight * (_factor(part, about) @ joined.directions.double().T).square().sum(0)
        total += weight * _total_about(part, about)
    return Certificate(as_energies(energies), total, rows)


def _parts(shards: Sequence[CalibrationData], name: str) -> list[Spectrum]:
    return [shard.spectra[name] for shard in shards if shard.layers[name].input is not None]


def _certain_end(shards: Sequence[CalibrationData], name: str) -> Status:
    """Return the layer's status before its joined rows are judged.

    It is non-finite as in one pass, else that of the shard where it is least settled.
    """
    ends = {shard.status[name] for shard in shards}
    if Status.NON_FINITE in ends:
        return Status.NON_FINITE
    if ends == {Status.NEVER_CALLED}:
        return Status.NEVER_CALLED
    if Status.SELDOM_ROUTED in ends:
        return Status.SELDOM_ROUTED
    return max(
        (end if end.usable else Status.DATA_EXHAUSTED for end in ends),
        key=_LEAST_SETTLED_LAST.index,
    )


def _joint_end(least_settled: Status, lack: Status | None) -> Status:
    """Return the status of joined rows, judged by what they lack as those of one pass are."""
    if least_settled is not Status.SELDOM_ROUTED:
        return lack or least_settled
    # in one shard; of all together there may be enough
    return Status.DATA_EXHAUSTED if lack is None else Status.SELDOM_ROUTED


def _joint_versions(shards: Sequence[CalibrationData]) -> dict[str, str]:
    """Return by library all versions that had a part."""
    versions: dict[str, set[str]] = {}
    for shard in shards:
        for library, version in shard.versions.items():
            versions.setdefault(library, set()).add(version)
    return {library: ", ".join(sorted(seen)) for library, seen in versions.items()}


def _first_bad_batch(shards: Sequence[CalibrationData], name: str) -> int | None:
    """Return the first bad batch, counted through the shards one after the other."""
    before = 0
    for shard in shards:
        batch = shard.layers[name].first_bad_batch
        if batch is not None:
            return before + batch
        before += shard.batches
    return None


def _require_same(first: CalibrationData, other: CalibrationData, number: int) -> None:
    """Raise a ConfigError unless two calibrations may be joined.

    That is if both are of the same layers of the same model, with settings of the same meaning.
    """
    refused = f"calibration {number} does not fit calibration 1"
    for here, there, number_here in ((first, other, 1), (other, first, number)):
        alone = [name for name in here.layers if name not in there.layers]
        if alone:
            raise ConfigError(
                f"{refused}: only calibration {number_here} has {shortened(alone, 3)}; merge"
                " calibrations of the same layers of the same model"
            )
    for name, layer in first.layers.items():
        _require_same_layer(layer, other.layers[name], refused)
    if not same_model(first.model, other.model):
        raise ConfigError(
            f"{refused}: its model is {other.model!r} and that of calibration 1 is {first.model!r};"
            " merge calibrations of the same model"
        )
    settings = asdict(first.config)
    for setting, value in asdict(other.config).items():
        if setting not in _MAY_DIFFER and value != settings[setting]:
            raise ConfigError(
                f"{refused}: its {setting} is {value!r} and that of calibration 1 is"
                f" {settings[setting]!r}; calibrate all shards with the same settings"
            )


def _require_same_layer(first: CalibratedLayer, other: CalibratedLayer, refused: str) -> None:
    """Raise a ConfigError that begins with `refused` unless sizes and bounds of ranks agree."""
    name = first.spec.name
    if other.spec != first.spec:
        raise ConfigError(
            f"{refused}: {name} is {other.spec.described()} there and {first.spec.described()} in"
            " calibration 1; merge calibrations of the same model"
        )
    if other.floor != first.floor:
        raise ConfigError(
            f"{refused}: {name} gets at least {other.floor} ranks there and {first.floor} in"
            " calibration 1; merge calibrations for adapters of the same kind"
        )
    if other.cap != first.cap:
        raise ConfigError(
            f"{refused}: {name} may get {other.cap or 'any number of'} ranks there and"
            f" {first.cap or 'any number of'} in calibration 1; merge calibrations for adapters"
            " with the same rank_pattern"
        )


def same_model(first: str, other: str) -> bool:
    """Return whether the `model` of two records says the same."""
    return _model_name(first) == _model_name(other)


def _model_name(model: str) -> tuple[str, str]:
    """Return class and last part of the path.

    Machines may keep the same weights in different folders.
    """
    kind, _, source = model.partition(" ")
    return kind, Path(source).name
