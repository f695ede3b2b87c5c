"""Calibrations of one model on separate shards of the data, joined from their records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evatune.calibration.status import Status, shortage
from evatune.errors import ConfigError
from evatune.sketch.spectrum import Certificate, Spectrum, as_energies, empty, fix_signs
from evatune.utils.text import shortened

if TYPE_CHECKING:
    from evatune.calibration.result import Calibration


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


def merge(shards: Sequence[Calibration]) -> Calibration:
    """See `Calibration.merge`."""
    shards = list(shards)
    if len(shards) < 2:
        raise ConfigError(
            f"merge got {len(shards)} calibrations; it joins two or more of the same model"
        )
    for number, other in enumerate(shards[1:], start=2):
        _require_same(shards[0], other, number)
    spectra, status, layers = {}, {}, {}
    joined: dict[tuple[int | None, ...], tuple[int, Spectrum]] = {}
    for name, layer in shards[0].layers.items():
        status[name] = _certain_end(shards, name)
        never = all(shard.layers[name].input is None for shard in shards)
        if never or status[name] is Status.NON_FINITE:
            spectra[name] = empty(layer.in_features, shards[0].config.center)
            layers[name] = replace(
                layer, input=None, first_bad_batch=_first_bad_batch(shards, name)
            )
            continue
        inputs = tuple(shard.layers[name].input for shard in shards)
        if inputs not in joined:  # layers that share an input in every shard still share it
            joined[inputs] = len(joined), merge_spectra(_parts(shards, name), shards[0].config.kept)
        number, spectrum = joined[inputs]
        needed = min(shards[0].config.kept, layer.in_features, layer.out_features)
        lack = shortage(spectrum.rows, spectrum.total_energy, needed)
        # in one shard; of all together there may be enough
        if status[name] is Status.SELDOM_ROUTED:
            status[name] = Status.DATA_EXHAUSTED if lack is None else Status.SELDOM_ROUTED
        else:
            status[name] = lack or status[name]
        spectra[name] = spectrum
        layers[name] = replace(layer, input=number)
    config = replace(
        shards[0].config,
        max_batches=sum(shard.config.max_batches for shard in shards),
        seed=min(shard.config.seed for shard in shards),
    )
    libraries = dict.fromkeys(library for shard in shards for library in shard.versions)
    versions = {
        library: ", ".join(
            sorted({shard.versions[library] for shard in shards if library in shard.versions})
        )
        for library in libraries
    }
    batches = sum(shard.batches for shard in shards)
    return replace(
        shards[0],
        spectra=spectra,
        status=status,
        layers=layers,
        config=config,
        batches=batches,
        versions=versions,
    )


def merge_spectra(parts: Sequence[Spectrum], components: int) -> Spectrum:
    """The `components` leading eigenpairs of what the parts kept, and the exact totals of all their
    rows.

    Args:
        parts: at least one spectrum, of one width, all centred or none. Those without rows do not
            count.
        components: how many directions to keep at most.

    Returns:
        A spectrum whose certificate rests on rows that had no part in its directions: those of one
        half of the parts, seen by the directions of the other half, the one with more rows.

    For what the directions can lose see `Calibration.merge`. Sums are float64. The order of parts
    changes rounding only. Cost: O(d·(m·k)²) for m parts of k directions, m·k ≤ d, and 16·m·k·d
    bytes.
    """
    if not any(part.rows for part in parts):
        return parts[0]
    parts = sorted(
        (part for part in parts if part.rows),
        key=lambda p: (p.rows, p.total_energy, p.energies.tolist()),
    )
    lively = [part for part in parts if part.total_energy > 0]
    answer = _join(parts, components)
    if len(lively) > 1:
        return replace(answer, certificate=_cross_check(lively, components))
    return replace(answer, certificate=lively[0].certificate if lively else None)


class LossBound(NamedTuple):
    """The share of a layer's energy that its leading merged directions can have lost against one
    pass, at most."""

    proven: float  # whatever the sketches found
    # if each shard's directions are the best for its own data, as the exact sketch's are
    given_best: float


def loss_bounds(
    merged: Calibration, shards: Sequence[Calibration], ranks: Mapping[str, int]
) -> dict[str, LossBound]:
    """Layer → bounds for its first `ranks[name]` directions; see `Calibration.merge`, where they
    are derived."""
    losses: dict[int | None, tuple[float, Tensor]] = {}
    bounds = {}
    for name, spectrum in merged.spectra.items():
        number, rank = merged.layers[name].input, ranks[name]
        if rank == 0 or spectrum.total_energy == 0:
            bounds[name] = LossBound(0.0, 0.0)
            continue
        if number not in losses:
            losses[number] = _losses(
                spectrum, [part for part in _parts(shards, name) if part.rows], merged.config.kept
            )
        outside, by_rank = losses[number]
        given_best = min(outside, float(by_rank[:rank][-1])) / spectrum.total_energy
        proven = given_best if merged.config.sketch == "exact" else outside / spectrum.total_energy
        bounds[name] = LossBound(proven, given_best)
    return bounds


def _losses(merged: Spectrum, parts: Sequence[Spectrum], components: int) -> tuple[float, Tensor]:
    """T and, for r = 1 … k, D_r of `Calibration.merge`, per row."""
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
    rows = sum(part.rows for part in parts)
    weights = torch.tensor([part.rows / rows for part in parts], dtype=torch.float64, device="cpu")
    mean = weights @ torch.stack([part.mean.double() for part in parts])
    factor = torch.cat(
        [weight.sqrt() * _factor(part, mean) for weight, part in zip(weights, parts, strict=True)]
    )
    _, singular, right = torch.linalg.svd(factor, full_matrices=False)
    kept = (singular > singular[:1] * _RTOL).nonzero().flatten()[:components]
    return Spectrum(
        directions=fix_signs(right[kept].float()).contiguous(),
        energies=as_energies(singular[kept].square()),
        total_energy=sum(
            float(w) * _total_about(part, mean) for w, part in zip(weights, parts, strict=True)
        ),
        rows=rows,
        mean=mean.float(),
        centered=parts[0].centered,
    )


def _factor(part: Spectrum, about: Tensor) -> Tensor:
    """F (≤ k + 1, d) float64 with FᵀF the kept second moment per row; about the row `about` when
    centring."""
    factor = part.energies.double().clamp_min(0).sqrt()[:, None] * part.directions.double()
    return torch.cat([factor, (part.mean.double() - about)[None]]) if part.centered else factor


def _total_about(part: Spectrum, about: Tensor) -> float:
    """Mean squared norm per row; about the row `about` when centring."""
    return part.total_energy + (
        float((part.mean.double() - about).square().sum()) if part.centered else 0.0
    )


def _cross_check(parts: Sequence[Spectrum], components: int) -> Certificate:
    """What the directions of one half of the parts capture of the other half's rows.

    What a part dropped cannot be measured and counts as missed, so the figure errs on the low side
    only. The shards' own certificates are of no use here: they are about directions that the merge
    has changed.
    """
    known, fresh = sorted(
        (parts[::2], parts[1::2]), key=lambda half: sum(part.rows for part in half), reverse=True
    )
    found = _join(known, components)
    rows = sum(part.rows for part in fresh)
    about = found.mean.double()
    energies, total = about.new_zeros(len(found.energies)), 0.0
    for part in fresh:
        weight = part.rows / rows
        energies += weight * (_factor(part, about) @ found.directions.double().T).square().sum(0)
        total += weight * _total_about(part, about)
    return Certificate(as_energies(energies), total, rows)


def _parts(shards: Sequence[Calibration], name: str) -> list[Spectrum]:
    return [shard.spectra[name] for shard in shards if shard.layers[name].input is not None]


def _certain_end(shards: Sequence[Calibration], name: str) -> Status:
    """The layer's status but for what the joined rows lack: non-finite as in one pass, else as the
    least settled."""
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


def _first_bad_batch(shards: Sequence[Calibration], name: str) -> int | None:
    """Counted through the shards one after the other."""
    before = 0
    for shard in shards:
        batch = shard.layers[name].first_bad_batch
        if batch is not None:
            return before + batch
        before += shard.batches
    return None


def _require_same(first: Calibration, other: Calibration, number: int) -> None:
    """Raise a ConfigError unless both are of the same layers of the same model, with settings of
    the same meaning."""
    refused = f"calibration {number} does not fit calibration 1"
    for a, b, whose in ((first, other, 1), (other, first, number)):
        alone = [name for name in a.layers if name not in b.layers]
        if alone:
            raise ConfigError(
                f"{refused}: only calibration {whose} has {shortened(alone, 3)}; merge"
                " calibrations of the same layers of the same model"
            )
    for name, layer in first.layers.items():
        mine, theirs = ((one.in_features, one.out_features) for one in (layer, other.layers[name]))
        if mine != theirs:
            raise ConfigError(
                f"{refused}: {name} is {theirs[0]}→{theirs[1]} there and {mine[0]}→{mine[1]} in"
                " calibration 1; merge calibrations of the same model"
            )
        if layer.cap != other.layers[name].cap:
            most, here = (one.cap or "any number of" for one in (other.layers[name], layer))
            raise ConfigError(
                f"{refused}: {name} may get {most} ranks there and {here} in calibration 1; merge "
                "calibrations for adapters with the same rank_pattern"
            )
    if not same_model(first.model, other.model):
        raise ConfigError(
            f"{refused}: its model is {other.model!r} and that of calibration 1 is {first.model!r};"
            " merge calibrations of the same model"
        )
    ours = asdict(first.config)
    for setting, value in asdict(other.config).items():
        if setting not in _MAY_DIFFER and value != ours[setting]:
            raise ConfigError(
                f"{refused}: its {setting} is {value!r} and that of calibration 1 is"
                f" {ours[setting]!r}; calibrate all shards with the same settings"
            )


def same_model(one: str, other: str) -> bool:
    """Whether the `model` of two records says the same."""
    return _model_name(one) == _model_name(other)


def _model_name(model: str) -> tuple[str, str]:
    """Class and last part of the path: machines may keep the same weights in different folders."""
    kind, _, source = model.partition(" ")
    return kind, Path(source).name
