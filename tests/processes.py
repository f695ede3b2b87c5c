"""Several processes over gloo on one machine: how they start, on what, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evatune import Calibration, CalibrationConfig
from tests.helpers import Toy, inputs

torch.set_num_threads(1)


ALL = CalibrationConfig(rank=4, max_batches=16, tolerance=0)
GRADIENTS = replace(ALL, objective="gradients")
REGRESSION = replace(ALL, objective="regression")
SETTINGS = {
    "nystrom": ALL,
    "centered": CalibrationConfig(rank=4, max_batches=16, tolerance=0, center=True),
    "exact": CalibrationConfig(rank=4, max_batches=16, tolerance=0, sketch="exact"),
}


def wide(count: int = 16) -> list[Tensor]:
    return inputs(count, rows=128, d=64)


def toy() -> Toy:
    return Toy(64)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    """Return a loss, the mean over examples."""
    result: Tensor = model(batch).square().mean()
    return result


def facts(calibration: Calibration) -> dict[str, Any]:
    return {
        "layers": {
            name: [
                s.directions,
                s.energies,
                s.mean,
                s.rows,
                s.total_energy,
                s.certificate and s.certificate.captured(),
            ]
            for name, s in calibration.spectra.items()
        },
        "status": {name: str(status) for name, status in calibration.status.items()},
        "inputs": {name: layer.input for name, layer in calibration.layers.items()},
        "bad": {
            name: [layer.first_bad_batch, layer.bad_process]
            for name, layer in calibration.layers.items()
        },
        "batches": calibration.batches,
        "processes": calibration.processes,
        "bytes": calibration.bytes_sent,
        "ranks": (
            calibration.allocate().ranks
            if all(status.usable for status in calibration.status.values())
            else None
        ),
    }


def error_of(work: Callable[[], Any]) -> list[str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the test looks at what it was
        work()
    return [caught.type.__name__, str(caught.value)]


def same(a: Any, b: Any) -> bool:
    """Return True if nested values are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "bytes")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def spawn(target: Callable[[int, str], None], folder: Path, count: int = 2) -> list[int | None]:
    """Return the exit codes of `count` processes."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, str(folder))) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]
