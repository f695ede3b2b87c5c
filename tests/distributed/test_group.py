"""A process group that fails clearly: errors of one process, lost ones, and different work."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import evatune
from evatune import CalibrationConfig
from evatune.distributed import group
from evatune.distributed import sketches as distributed_sketches
from evatune.errors import ConfigError, ProcessError
from tests.distributed.scenarios import no_space
from tests.processes import ALL, error_of, spawn, toy, wide


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("other_seed", "config seed is 0 on process 0 and 1 on process 1"),
        ("other_targets", "only process 0 has layers blocks.0.down"),
        ("other_weights", "weights blocks.1.down.weight is "),
        ("other_model", "model is Sequential on process 0 and Toy on process 1"),
        ("other_alpha", "lora_alpha is 8 on process 0 and 16 on process 1"),
    ],
)
def test_different_work_is_refused_on_every_process(
    both: list[dict[str, Any]], name: str, says: str
) -> None:
    for found in both:
        kind, message = found[name]
        assert kind == ProcessError.__name__
        assert says in message


def test_a_process_without_data_is_named_on_every_process(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["no_data"][0] == "DataError"
        assert "process 1 of 2 got not one batch" in found["no_data"][1]
        assert found["no_data_at_all"][0] == "NoBatchError"
        assert "not one batch came" in found["no_data_at_all"][1]


def test_the_error_of_one_process_is_told_to_the_others(both: list[dict[str, Any]]) -> None:
    assert both[1]["failing_model"] == ["ArithmeticError", "of all things"]
    kind, message = both[0]["failing_model"]
    assert kind == ProcessError.__name__
    assert "process 1 of 2 stopped, and so do all: ArithmeticError: of all things" in message
    assert both[1]["failing_at_the_end"] == ["MemoryError", "no space left"]
    assert "process 1 of 2 stopped, and so do all: MemoryError" in both[0]["failing_at_the_end"][1]
    assert both[1]["no_such_target"][0] == "TargetError"
    assert (
        "process 1 of 2 stopped, and so do all: TargetError: targets ['nothing']"
        in both[0]["no_such_target"][1]
    )


def test_what_does_not_add_up_is_refused(both: list[dict[str, Any]]) -> None:
    assert both[0]["incremental"][0] == ConfigError.__name__
    assert "Calibration.merge" in both[0]["incremental"][1]


def dying(rank: int, folder: str) -> None:
    """Process 1 of three vanishes in its third batch; the others must say so, and soon."""
    group._GRACE_SECONDS = 4.0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        if rank == 1 and torch.equal(batch, wide()[7]):
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch)

    try:
        evatune.calibrate(toy(), wide()[rank::3], ALL, forward=forward)
    except ProcessError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))


def test_a_process_that_dies_is_named_by_the_others(tmp_path: Path) -> None:
    assert spawn(dying, tmp_path, 3) == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        assert "lost process 1 of 3" in (tmp_path / f"{rank}.txt").read_text()


def failing_between(rank: int, folder: str) -> None:
    """Process 1 fails between two messages of an exchange, where it has no message to say so, and
    lives on."""
    if rank == 1:
        distributed_sketches.refresh_all = no_space
    said = error_of(lambda: evatune.calibrate(toy(), wide()[rank::2], ALL))
    Path(folder, f"{rank}.txt").write_text(": ".join(said))
    end = time.monotonic() + 60
    while not Path(folder, "0.txt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    # or process 0 would have waited for the end of this one
    assert Path(folder, "0.txt").exists()


def test_a_failure_between_two_messages_ends_all(tmp_path: Path) -> None:
    assert spawn(failing_between, tmp_path) == [0, 0]
    assert (tmp_path / "1.txt").read_text() == "MemoryError: no space left"
    said = (tmp_path / "0.txt").read_text()
    assert said.startswith("ProcessError")
    assert "stopped in the middle of a message" in said or "lost process 1 of 2" in said


def failing_in_shards(rank: int, folder: str) -> None:
    """Process 1 fails while process 0 waits for its part of the weights, not for a message."""
    model = toy()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        if rank == 1 and torch.equal(batch, wide()[5]):
            raise MemoryError("no space left")
        return model(batch)

    said = error_of(lambda: evatune.calibrate(model, wide()[rank::2], ALL, forward=forward))
    Path(folder, f"{rank}.txt").write_text(": ".join(said))


def test_a_failure_among_shards_ends_all(tmp_path: Path) -> None:
    assert spawn(failing_in_shards, tmp_path) == [0, 0]
    assert (tmp_path / "1.txt").read_text() == "MemoryError: no space left"
    assert (tmp_path / "0.txt").read_text().startswith("ProcessError: ")


def late(rank: int, folder: str) -> None:
    """Process 1 works alone at first and then comes; process 2 comes when both have given up."""
    if rank == 1:
        evatune.calibrate(toy(), wide(4), CalibrationConfig(rank=4, tolerance=0, distributed=False))
    if rank < 2:
        said = error_of(
            lambda: evatune.calibrate(toy(), wide(), replace(ALL, rendezvous_timeout=3))
        )
        Path(folder, f"{rank}.txt").write_text(": ".join(said))
    end = time.monotonic() + 60
    while len(list(Path(folder).glob("?.txt"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert evatune.calibrate(toy(), wide()[rank::3], ALL).processes == 3


def test_processes_that_come_late_are_named_and_all_can_try_again(tmp_path: Path) -> None:
    assert spawn(late, tmp_path, 3) == [0, 0, 0]
    for rank in (0, 1):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said.startswith(
            "ProcessError: process 2 of 3 did not come to calibrate within 3 seconds; call"
            " evatune on"
        )
        assert "rendezvous_timeout" in said


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan"), "10", True])
def test_a_time_to_come_is_a_finite_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(ConfigError, match="rendezvous_timeout"):
        CalibrationConfig(rendezvous_timeout=seconds)
