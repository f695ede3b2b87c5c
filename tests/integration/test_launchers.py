"""Trainer on two processes, as launchers start them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import launch

SCRIPT = Path(__file__).parents[1] / "trainers" / "launched.py"
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

_TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With --cpu accelerate starts one process, whatever their number, unless there is MPI. --multi_gpu
# starts them all, and without a GPU they talk through gloo.
_ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--main_process_port",
    "0",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]

Found = list[dict[str, dict[str, Any]]]


def found_by(launcher: list[str], folder: Path, *trainings: str) -> Found:
    """Return what each of two processes found, by training."""
    launch(launcher, SCRIPT, folder, *trainings, DS_ACCELERATOR="cpu")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Found:
    trainings = ["plain", "zero3"] if DEEPSPEED else ["plain"]
    return found_by(_TORCHRUN, tmp_path_factory.mktemp("torchrun"), *trainings)


@pytest.fixture(scope="module")
def accelerate(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by(_ACCELERATE, tmp_path_factory.mktemp("accelerate"), "plain")


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_start_from_the_same_adapter_and_train_it(
    launcher: str, request: pytest.FixtureRequest
) -> None:
    first, second = (found["plain"] for found in request.getfixturevalue(launcher))
    assert first["processes"] == second["processes"] == 2
    assert "evatune/batches" in first["history"][0]
    assert "evatune/batches" in second["history"][0]
    for name in ("started", "trained"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(first["started"], first["trained"])


@pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed")
def test_a_trainer_with_zero_3_is_initialized_in_one_line(torchrun: Found) -> None:
    first, second = (found["zero3"] for found in torchrun)
    assert first["processes"] == second["processes"] == 2
    assert first["wrapped"] == second["wrapped"] == "DeepSpeedEngine"
    history = first["history"]
    assert history[0]["evatune/layers"] == 14
    assert all(entry["grad_norm"] > 0 for entry in history[1:4])
