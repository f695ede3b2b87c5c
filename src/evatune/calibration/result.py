"""The record of a calibration: spectra, statuses and settings, in one safetensors file."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.merge import merge as _merge
from evatune.calibration.status import Status
from evatune.errors import LayerError
from evatune.layers import LayerSpec
from evatune.ranks.allocation import Candidate, RankPlan
from evatune.ranks.allocation import allocate as _allocate
from evatune.schemas import Damage, shown, telling
from evatune.sketch.spectrum import Certificate, Spectrum, empty
from evatune.utils.atomic import atomic_file
from evatune.utils.text import shortened
from evatune.version import __version__

if TYPE_CHECKING:
    from evatune.schemas.record import CalibrationRecord, InputRecord, LayerRecord


# Written is the first; the second has no checksum.
_FORMATS = ("evatune-calibration-2", "evatune-calibration-1")


_ADVICE = "give the calibration.safetensors that evatune wrote, or run the calibration again"


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer, and what is known about it besides its spectrum."""

    spec: LayerSpec
    # layers with the same number share one input and one spectrum; None: never called
    input: int | None
    first_bad_batch: int | None = None  # counted from 1, over all processes
    bad_process: int | None = None  # the one that had it, where several worked together
    # the most ranks it may get, by the `rank_pattern` of the adapter it was calibrated for
    cap: int | None = None
    floor: int = 0  # the fewest ranks it gets: 1 for embeddings that PEFT saves with their adapter

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features


@dataclass(frozen=True)
class Calibration:
    """What a model's layers saw. Keys are module names of the base model, in model order."""

    spectra: dict[str, Spectrum]
    status: dict[str, Status]
    layers: dict[str, CalibratedLayer]
    config: CalibrationConfig
    batches: int
    model: str = ""
    processes: int = 1  # that saw the batches together
    bytes_sent: int = 0  # by this one of them to the others
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    def allocate(
        self,
        rank: int | None = None,
        rho: float | None = None,
        budget: str | None = None,
        metric: str | None = None,
        min_rank: int = 0,
    ) -> RankPlan:
        """Redistribute a rank budget; see `evatune.ranks.allocate`.

        Defaults come from `config`, caps and floors from `layers`.
        """
        config = self.config
        return _allocate(
            {
                name: Candidate(layer.spec, self.spectra[name])
                for name, layer in self.layers.items()
            },
            rank=config.rank_or_default if rank is None else rank,
            rho=config.rho_or_default if rho is None else rho,
            budget=config.budget if budget is None else budget,
            metric=config.metric if metric is None else metric,
            min_rank=min_rank,
            caps={name: layer.cap for name, layer in self.layers.items() if layer.cap is not None},
            floors={name: layer.floor for name, layer in self.layers.items() if layer.floor},
        )

    @classmethod
    def merge(cls, shards: Sequence[Calibration]) -> Calibration:
        """Join calibrations of the same model that were computed apart, each on a shard of the data
        of its own.

        Per layer, the leading directions of Σ nᵢKᵢ / N, where shard i has nᵢ of the N rows and Kᵢ
        is what its record keeps of their second moment Cᵢ. Rows, batches, means and total energies
        are exactly those of one pass; centred records join about the common mean. Sums are float64;
        the order of shards changes rounding only.

        What that can lose. No sketch reports what its data does not hold: Cᵢ = Kᵢ + Rᵢ with Rᵢ ⪰ 0,
        and tr Rᵢ is the energy outside the shard's directions, its `tail_energy`. Let T = Σ nᵢ·tr
        Rᵢ / N. By Weyl's and Ky Fan's inequalities, for every r and per row,

            best_r - T  ≤  Σ_{j≤r} energies_j  ≤  captured_r  ≤  best_r

        up to rounding, where best_r is the energy that the r best directions for all the data
        capture of it, and captured_r what the first r merged ones do. T is nearly reached where
        every shard drops one and the same direction, and 0 where the data of every shard has a rank
        of at most k.

        Where each shard's directions are the best for its own data, as with `sketch="exact"`, Rᵢ ⪯
        fᵢ(I - Pᵢ), with fᵢ the shard's smallest kept energy and Pᵢ the projection on its
        directions. Then Σ nᵢCᵢ / N ⪯ L + f·I, with f = Σ nᵢfᵢ / N and L the merge of the shards
        with their energies lowered by fᵢ, and T may be replaced by

            D_r = Σ_{j≤r} (λ_j(L) + f - energies_j)  ≤  r·f

        which is 0 where all shards agree on their directions. More `components` make both smaller.
        For the figures of a merge see `evatune.calibration.merge.loss_bounds`; `evatune merge`
        prints them.

        Args:
            shards: two or more, of the same layers, with the same settings but for `seed` and
                `max_batches`.

        Returns:
            A new calibration. Its certificates are what the directions of one half of the shards
            capture of the other half's rows, by what the records keep of them: low where shards
            differ or drop much, not high. A layer is `non_finite` if it is so in one shard, as in
            one pass. Otherwise what the shards know is joined, its rows are judged as those of one
            pass, and the layer is as settled as in its least settled shard; a shard that has no
            usable result for it counts as `data_exhausted`. `first_bad_batch` counts through the
            shards in the order given.

        Raises:
            ConfigError: fewer than two, or one that does not fit the first; the message names the
                difference.

        Cost: per distinct input O(d·(m·k)²) for m shards, m·k ≤ d.
        """
        return _merge(shards)

    def captured(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the share of fresh rows' energy inside each layer's directions, as its rank is.

        Layers without a rank, a certificate or a finite share are left out.
        """
        shares: dict[str, float] = {}
        for name, rank in ranks.items():
            certificate = self.spectra[name].certificate
            share = certificate.captured(rank) if rank and certificate else math.nan
            if math.isfinite(share):
                shares[name] = share
        return shares

    def require_usable(self) -> None:
        """Raise a LayerError that lists every layer no adapter can be initialised for, with
        advice."""
        failed: dict[Status, list[str]] = {}
        for name, status in self.status.items():
            if not status.usable:
                failed.setdefault(status, []).append(self._explain(name))
        if failed:
            lines = [
                f"{status}: {shortened(names)}; {status.advice}" for status, names in failed.items()
            ]
            total = sum(map(len, failed.values()))
            raise LayerError(
                f"{total} of {len(self.status)} layers cannot be initialised: " + ". ".join(lines)
            )

    def _explain(self, name: str) -> str:
        spectrum, layer = self.spectra[name], self.layers[name]
        if self.status[name] is Status.NON_FINITE:
            where = "" if layer.bad_process is None else f" on process {layer.bad_process}"
            return f"{name} (first in batch {layer.first_bad_batch}{where})"
        if self.status[name] is Status.TOO_FEW_ROWS:
            return (
                f"{name} ({spectrum.rows} rows for {min(self.config.kept, layer.in_features)}"
                " components)"
            )
        return name

    # -- file --------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: under a temporary name first, then renamed, so it is whole or
        absent.

        It carries a checksum over all of its contents. Missing folders are made.
        """
        from evatune.schemas.tensors import save_sealed

        tensors: dict[str, Tensor] = {}
        inputs: dict[str, dict[str, Any]] = {}
        for name, layer in self.layers.items():
            if layer.input is None or str(layer.input) in inputs:
                continue
            spectrum = self.spectra[name]
            key = str(layer.input)
            tensors[f"{key}.directions"] = spectrum.directions.contiguous()
            tensors[f"{key}.energies"] = spectrum.energies.contiguous()
            tensors[f"{key}.mean"] = spectrum.mean.contiguous()
            facts: dict[str, Any] = {"total_energy": spectrum.total_energy, "rows": spectrum.rows}
            if spectrum.certificate is not None:
                tensors[f"{key}.fresh_energies"] = spectrum.certificate.energies.contiguous()
                facts |= {
                    "fresh_total_energy": spectrum.certificate.total_energy,
                    "fresh_rows": spectrum.certificate.rows,
                }
            inputs[key] = facts
        record = {
            "config": asdict(self.config),
            "batches": self.batches,
            "model": self.model,
            "processes": self.processes,
            "bytes_sent": self.bytes_sent,
            "versions": self.versions,
            "inputs": inputs,
            "layers": {
                name: _layer_facts(layer, self.status[name]) for name, layer in self.layers.items()
            },
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as temporary:
            save_sealed(temporary, tensors, _FORMATS[0], json.dumps(record))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote; nothing is unpickled.

        Raises RecordError for anything else, and for what contradicts itself: directions that are
        not orthonormal, energies that rise or exceed their total, certificates that rest on more
        rows than there were, statuses that do not fit.
        """
        from evatune.schemas.record import CalibrationRecord
        from evatune.schemas.tensors import read_sealed
        from evatune.schemas.text import validate_json

        with telling(path, _ADVICE):
            tensors, text = read_sealed(Path(path), _FORMATS, "an evatune calibration")
            try:
                return cls._from_record(validate_json(CalibrationRecord, text), tensors)
            except Damage as damage:
                raise Damage(
                    f"says it is an evatune calibration, but its record is damaged: it {damage}"
                ) from damage

    @classmethod
    def _from_record(cls, record: CalibrationRecord, tensors: dict[str, Tensor]) -> Calibration:
        config = record.config
        spectra = {
            number: _spectrum(number, facts, config, tensors)
            for number, facts in record.inputs.items()
        }
        if tensors:
            raise Damage(f"does not say what the tensor {shown(min(tensors))} is")
        of_layers, status, layers = {}, {}, {}
        for name, facts in record.layers.items():
            status[name] = facts.status
            layers[name] = _layer_of(name, facts)
            if facts.input is None:
                of_layers[name] = empty(facts.in_features, config.center)
            else:
                of_layers[name] = spectra[str(facts.input)]
            _require_fit(name, layers[name], status[name], of_layers[name])
        return cls(
            of_layers,
            status,
            layers,
            config,
            record.batches,
            record.model,
            processes=record.processes,
            bytes_sent=record.bytes_sent,
            versions=record.versions,
        )


def _spectrum(
    number: str,
    facts: InputRecord,
    config: CalibrationConfig,
    tensors: dict[str, Tensor],
) -> Spectrum:
    """Return what the tensors of an input say, and take them out of `tensors`.

    Raises Damage for what contradicts itself.
    """
    sublayers = ["directions", "energies", "mean"]
    if facts.fresh_rows is not None:
        sublayers.append("fresh_energies")
    missing = [sublayer for sublayer in sublayers if f"{number}.{sublayer}" not in tensors]
    if missing:
        raise Damage(f"lacks the tensor {number}.{missing[0]}")
    directions, energies, mean, *fresh = (
        tensors.pop(f"{number}.{sublayer}") for sublayer in sublayers
    )
    certificate = None
    if facts.fresh_rows is not None and facts.fresh_total_energy is not None:
        certificate = Certificate(fresh[0], facts.fresh_total_energy, facts.fresh_rows)
    spectrum = Spectrum(
        directions,
        energies,
        facts.total_energy,
        facts.rows,
        mean,
        centered=config.center,
        certificate=certificate,
    )
    for contradiction in spectrum.contradictions(config.kept):
        raise Damage(f"contradicts itself in input {number}: {contradiction}")
    return spectrum


def _layer_facts(layer: CalibratedLayer, status: Status) -> dict[str, Any]:
    """Return a layer as the file has it; `_layer_of` reads it."""
    return {
        "in_features": layer.spec.in_features,
        "out_features": layer.spec.out_features,
        "input": layer.input,
        "first_bad_batch": layer.first_bad_batch,
        "bad_process": layer.bad_process,
        "cap": layer.cap,
        "floor": layer.floor,
        "groups": layer.spec.groups,
        "unit": layer.spec.rank_group,
        "status": status,
    }


def _layer_of(name: str, facts: LayerRecord) -> CalibratedLayer:
    return CalibratedLayer(
        LayerSpec(name, facts.in_features, facts.out_features, facts.groups, facts.rank_group),
        input=facts.input,
        first_bad_batch=facts.first_bad_batch,
        bad_process=facts.bad_process,
        cap=facts.cap,
        floor=facts.floor,
    )


def _require_fit(name: str, layer: CalibratedLayer, status: Status, spectrum: Spectrum) -> None:
    """Raise Damage unless the spectrum is one of this layer that may have ended so."""
    if layer.input is not None and spectrum.directions.shape[1] != layer.in_features:
        raise Damage(
            f"gives {shown(name)} {layer.in_features} inputs, and others in its directions"
        )
    # An expert may get an adapter that no row says anything of.
    seldom = status is Status.SELDOM_ROUTED
    if status.usable and not seldom and not (spectrum.rows and spectrum.total_energy):
        raise Damage(f"calls {shown(name)} {status}, and its rows have no energy")


def _versions() -> dict[str, str]:
    return {"evatune": __version__, "torch": torch.__version__, "python": platform.python_version()}
