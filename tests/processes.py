"""Several processes over gloo on one machine: how they start, on what, and what they return."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
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

# Persistent parameters are not sharded; without a threshold a toy would be nothing else.
ZERO_3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
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
        "missed": {name: layer.estimated_missed for name, layer in calibration.layers.items()},
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


# -- how they start and end ------------------------------------------------------------------------

Work = Callable[[int, str], None]

# Processes are forked from one that has imported what takes seconds, and has computed nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["transformers.trainer", "peft", "evatune.finetune.run", __name__])


def spawn(work: Work, folder: Path, count: int = 2) -> list[int | None]:
    """Run `work(rank, folder)` on `count` processes of one gloo group; return their exit codes."""
    processes = [
        FORKS.Process(target=_in_group, args=(work, rank, str(folder), count))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _in_group(work: Work, rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    work(rank, folder)
    leave()


def launched(work: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run `work` on two processes with what a launcher says to each; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [FORKS.Process(target=_launched, args=(work, rank, port, arguments)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in both]


def _launched(work: Callable[..., None], rank: int, port: int, arguments: Any) -> None:
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(place | numbers | {"OMP_NUM_THREADS": "1"})
    work(*arguments)
    leave()


def launch(
    launcher: Sequence[str], script: Path, *arguments: str | Path, **environment: str
) -> None:
    """Run a script by a launcher, a module with options, and require that it ends well."""
    root = Path(__file__).parents[1]
    found = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": found} | environment,
    )
    assert done.returncode == 0, done.stderr


def leave() -> NoReturn:
    """End this process with status 0, once what it found is on the disk.

    It leaves out the end of the interpreter, in which a thread of gloo may be about to give back a
    tensor: it waits for the interpreter's lock, is unwound in place of getting it, and takes the
    process along ("terminate called without an active exception"; pytorch/pytorch#190489). Groups
    that were destroyed have such threads too, as long as DDP holds on to them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
