"""The record of a calibration: spectra, statuses and settings, in one safetensors file."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evatune.config import CalibrationConfig
from evatune.errors import LayerError, RecordError
from evatune.files import whole_file
from evatune.merge import merge as _merge
from evatune.ranks import Candidate, RankPlan
from evatune.ranks import allocate as _allocate
from evatune.spectrum import Certificate, Spectrum, empty
from evatune.status import Status
from evatune.version import __version__

_FORMAT = "evatune-calibration-1"


@dataclass(frozen=True)
class Layer:
    """What is known about a calibrated layer besides its spectrum."""

    in_features: int
    out_features: int
    input: int | None  # layers with the same number share one input and one spectrum; None: never called
    first_bad_batch: int | None = None  # counted from 1, over all processes
    bad_process: int | None = None  # the one that had it, where several worked together
    cap: int | None = None  # the most ranks it may get, by the `rank_pattern` of the adapter it was calibrated for
    floor: int = 0  # the fewest ranks it gets: 1 for embeddings that PEFT saves with their adapter
    groups: int = 1  # ranks come in multiples of this: groups of a convolution
    unit: str = ""  # layers with the same name here have one rank: the experts of one weight, parts of one attention

    @property
    def shape(self) -> tuple[int, int, int, str]:
        """What an adapter of this layer depends on."""
        return self.in_features, self.out_features, self.groups, self.unit

    def described(self) -> str:
        """The shape in words."""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.in_features}→{self.out_features}{groups}" + (f" as a part of {self.unit}" if self.unit else "")

    def candidate(self, spectrum: Spectrum) -> Candidate:
        """The layer as the redistribution sees it."""
        return Candidate(spectrum, self.in_features, self.out_features, self.groups, self.unit)


@dataclass(frozen=True)
class Calibration:
    """What a model's layers saw. Keys are module names of the base model, in model order."""

    spectra: dict[str, Spectrum]
    status: dict[str, Status]
    layers: dict[str, Layer]
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
            {name: layer.candidate(self.spectra[name]) for name, layer in self.layers.items()},
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
        """Join calibrations of the same model that were computed apart, each on a shard of the data of its own.

        Per layer, the leading directions of Σ nᵢKᵢ / N, where shard i has nᵢ of the N rows and Kᵢ is what its record
        keeps of their second moment Cᵢ. Rows, batches, means and total energies are exactly those of one pass; centred
        records join about the common mean. Sums are float64; the order of shards changes rounding only.

        What that can lose. No sketch reports what its data does not hold: Cᵢ = Kᵢ + Rᵢ with Rᵢ ⪰ 0, and tr Rᵢ is the
        energy outside the shard's directions, its `tail_energy`. Let T = Σ nᵢ·tr Rᵢ / N. By Weyl's and Ky Fan's
        inequalities, for every r and per row,

            best_r - T  ≤  Σ_{j≤r} energies_j  ≤  captured_r  ≤  best_r

        up to rounding, where best_r is the energy that the r best directions for all the data capture of it, and
        captured_r what the first r merged ones do. T is nearly reached where every shard drops one and the same
        direction, and 0 where the data of every shard has a rank of at most k.

        Where each shard's directions are the best for its own data, as with `sketch="exact"`, Rᵢ ⪯ fᵢ(I - Pᵢ), with fᵢ
        the shard's smallest kept energy and Pᵢ the projection on its directions. Then Σ nᵢCᵢ / N ⪯ L + f·I, with
        f = Σ nᵢfᵢ / N and L the merge of the shards with their energies lowered by fᵢ, and T may be replaced by

            D_r = Σ_{j≤r} (λ_j(L) + f - energies_j)  ≤  r·f

        which is 0 where all shards agree on their directions. More `components` make both smaller. For the figures of
        a merge see `evatune.merge.loss_bounds`; `evatune merge` prints them.

        Args:
            shards: two or more, of the same layers, with the same settings but for `seed` and `max_batches`.

        Returns:
            A new calibration. Its certificates are what the directions of one half of the shards capture of the other
            half's rows, by what the records keep of them: low where shards differ or drop much, not high. A layer is
            `non_finite` if it is so in one shard, as in one pass. Otherwise what the shards know is joined, its rows
            are judged as those of one pass, and the layer is as settled as in its least settled shard; a shard that
            has no usable result for it counts as `data_exhausted`. `first_bad_batch` counts through the shards in the
            order given.

        Raises:
            ConfigError: fewer than two, or one that does not fit the first; the message names the difference.

        Cost: per distinct input O(d·(m·k)²) for m shards, m·k ≤ d.
        """
        return _merge(shards)

    def require_usable(self) -> None:
        """Raise a LayerError that lists every layer no adapter can be initialised for, with advice."""
        failed: dict[Status, list[str]] = {}
        for name, status in self.status.items():
            if not status.usable:
                failed.setdefault(status, []).append(self._explain(name))
        if failed:
            lines = []
            for status, names in failed.items():
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{status}: {', '.join(names[:5])}{more}; {status.advice}")
            total = sum(map(len, failed.values()))
            raise LayerError(f"{total} of {len(self.status)} layers cannot be initialised: " + ". ".join(lines))

    def _explain(self, name: str) -> str:
        spectrum, layer = self.spectra[name], self.layers[name]
        if self.status[name] is Status.NON_FINITE:
            where = "" if layer.bad_process is None else f" on process {layer.bad_process}"
            return f"{name} (first in batch {layer.first_bad_batch}{where})"
        if self.status[name] is Status.TOO_FEW_ROWS:
            return f"{name} ({spectrum.rows} rows for {min(self.config.kept, layer.in_features)} components)"
        return name

    # -- file -----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: under a temporary name first, then renamed, so it is whole or absent.

        Missing folders are made.
        """
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
            "layers": {name: asdict(layer) | {"status": self.status[name]} for name, layer in self.layers.items()},
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "record": json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote. Raises RecordError for anything else; nothing is unpickled."""
        if not Path(path).is_file():
            raise RecordError(f"{path} is not a file; give the calibration.safetensors that evatune wrote")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise RecordError(
                        f"{path} is a safetensors file but not an evatune calibration (format "
                        f"{metadata.get('format')!r}, expected {_FORMAT!r}); give the calibration.safetensors that "
                        "evatune wrote"
                    )
                return cls._from_record(json.loads(metadata["record"]), file)
        except SafetensorError as error:
            raise RecordError(f"{path} is damaged or not a safetensors file ({error}); run the calibration again") from error
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, RecordError):
                raise
            raise RecordError(
                f"{path} says it is an evatune calibration but its record is damaged ({type(error).__name__}: {error}); "
                "run the calibration again"
            ) from error

    @classmethod
    def _from_record(cls, record: dict[str, Any], file: Any) -> Calibration:
        config = CalibrationConfig(**record["config"])
        by_input: dict[int, Spectrum] = {}
        for key, facts in record["inputs"].items():
            certificate = None
            if "fresh_rows" in facts:
                certificate = Certificate(
                    file.get_tensor(f"{key}.fresh_energies"), facts["fresh_total_energy"], facts["fresh_rows"]
                )
            by_input[int(key)] = Spectrum(
                directions=file.get_tensor(f"{key}.directions"),
                energies=file.get_tensor(f"{key}.energies"),
                total_energy=facts["total_energy"],
                rows=facts["rows"],
                mean=file.get_tensor(f"{key}.mean"),
                centered=config.center,
                certificate=certificate,
            )
        for spectrum in by_input.values():
            _require_whole(spectrum)
        spectra, status, layers = {}, {}, {}
        for name, facts in record["layers"].items():
            status[name] = Status(facts.pop("status"))
            layer = layers[name] = Layer(**facts)
            if not (isinstance(layer.in_features, int) and isinstance(layer.out_features, int) and layer.out_features > 0):
                raise ValueError(f"sizes of {name} are {layer.in_features!r} and {layer.out_features!r}")
            if not (isinstance(layer.groups, int) and layer.groups > 0 and isinstance(layer.unit, str)):
                raise ValueError(f"groups and unit of {name} are {layer.groups!r} and {layer.unit!r}")
            if layer.input is not None and by_input[layer.input].directions.shape[1] != layer.in_features:
                raise ValueError(f"{name} has {layer.in_features} inputs but directions of another width")
            spectra[name] = empty(layer.in_features, config.center) if layer.input is None else by_input[layer.input]
        return cls(
            spectra,
            status,
            layers,
            config,
            record["batches"],
            record["model"],
            processes=record.get("processes", 1),
            bytes_sent=record.get("bytes_sent", 0),
            versions=record["versions"],
        )


def _require_whole(spectrum: Spectrum) -> None:
    """Raise a ValueError unless shapes fit each other and every number is one."""
    directions, energies = spectrum.directions, spectrum.energies
    if directions.ndim != 2 or energies.shape != directions.shape[:1] or spectrum.mean.shape != directions.shape[1:]:
        raise ValueError(f"directions {tuple(directions.shape)}, energies {tuple(energies.shape)} and mean do not fit")
    if not isinstance(spectrum.rows, int) or not isinstance(spectrum.total_energy, (int, float)):
        raise ValueError("rows and total_energy are not numbers")
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (directions, energies, spectrum.mean))
    if spectrum.rows < 0 or not (finite and math.isfinite(spectrum.total_energy)):
        raise ValueError("a number is NaN, Inf or a negative count")


def _versions() -> dict[str, str]:
    return {"evatune": __version__, "torch": torch.__version__, "python": platform.python_version()}
