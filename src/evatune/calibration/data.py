"""A calibration as plain data: what a run found, what a file holds, what a merge joins."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

import torch

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.status import Status
from evatune.layers import LayerSpec
from evatune.sketch.spectrum import Spectrum
from evatune.version import __version__


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
    # share of the best directions' energy that the layer's, as many as its rank, are expected to
    # miss on fresh data; None: nothing to judge by
    estimated_missed: float | None = None
    floor: int = 0  # the fewest ranks it gets: 1 for embeddings that PEFT saves with their adapter

    def uniform_rank(self, rank: int) -> int:
        """Return its rank without redistribution, where `rank` is that of layers with no cap."""
        return self.cap or rank

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features


@dataclass(frozen=True)
class CalibrationData:
    """Spectra and statuses of layers, by their names in the base model, in model order."""

    spectra: dict[str, Spectrum]
    status: dict[str, Status]
    layers: dict[str, CalibratedLayer]
    config: CalibrationConfig
    batches: int
    model: str = ""
    processes: int = 1  # that saw the batches together
    bytes_sent: int = 0  # by this one of them to the others
    estimated_missed: float | None = None  # of all layers, weighted by their ranks
    versions: dict[str, str] = field(default_factory=lambda: _versions())


def _versions() -> dict[str, str]:
    return {"evatune": __version__, "torch": torch.__version__, "python": platform.python_version()}
