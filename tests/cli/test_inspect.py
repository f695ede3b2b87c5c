"""`evatune inspect`: what it prints, and what bad files get."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import evatune
from evatune.choices import SCALES
from tests.conftest import Command, refused


def test_inspect_prints_a_calibration(command: Command, written: Path) -> None:
    answer = command("inspect", written / "calibration.safetensors")
    assert answer.status == 0
    assert "What each layer got" in answer.out
    assert "encoder.layer.0.attention.self.query" in answer.out
    assert all(f" at scale={scale}, where κ is " in answer.out for scale in SCALES)
    assert "norm of B" not in answer.out


def test_inspect_prints_an_adapter(command: Command, written: Path) -> None:
    answer = command("inspect", written / "adapter_model.safetensors")
    assert answer.status == 0
    assert "norm of B" in answer.out
    assert "What each layer got" not in answer.out


def test_inspect_prints_both_of_a_folder(command: Command, written: Path) -> None:
    answer = command("inspect", written)
    assert answer.status == 0
    assert "norm of B" in answer.out
    assert "What each layer got" in answer.out


def test_inspect_goes_by_content_not_by_name(
    command: Command, written: Path, tmp_path: Path
) -> None:
    shutil.copy(written / "adapter_model.safetensors", tmp_path / "weights.safetensors")
    shutil.copy(written / "adapter_config.json", tmp_path)
    shutil.copy(written / "calibration.safetensors", tmp_path / "adapter_calibration.safetensors")
    assert "norm of B" in command("inspect", tmp_path / "weights.safetensors").out
    assert (
        "What each layer got"
        in command("inspect", tmp_path / "adapter_calibration.safetensors").out
    )


def test_inspect_json_says_the_ranks_of_both(command: Command, written: Path) -> None:
    answer = command("inspect", written, "--json")
    facts = json.loads(answer.out)
    assert answer.out.count("\n") == 1
    ranks = {row["name"]: row["rank"] for row in facts["layers"]}
    assert {row["layer"]: row["rank"] for row in facts["adapter"]} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert all(row["b_norm"] == 0 for row in facts["adapter"])
    assert all(row["a_row_norm"] == pytest.approx(1) for row in facts["adapter"])
    assert all(row["scale"] == 1 for row in facts["adapter"])
    spread = facts["totals"]["step_ratio"]
    assert list(spread) == list(SCALES)
    assert spread["matched"]["median"] < spread["paper"]["median"] <= spread["paper"]["largest"]
    assert all(1 <= row["participation_ratio"] <= row["in_features"] for row in facts["layers"])


class Partly(nn.Module):
    """One layer in use, one that never is, one that sees zeros, one that sees NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.zero, self.nan = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.zero(x * 0)
        self.nan(x * torch.nan)
        return self.used(x)


@pytest.fixture
def partly(tmp_path: Path) -> Path:
    batches = list(torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0)))
    calibration = evatune.calibrate(Partly(), batches, evatune.CalibrationConfig(rank=2))
    calibration.save(tmp_path / "partly.safetensors")
    return tmp_path / "partly.safetensors"


def test_inspect_shows_the_statuses_of_a_calibration_that_went_wrong(
    command: Command, partly: Path
) -> None:
    answer = command("inspect", partly)
    assert answer.status == 0, answer.err
    for name, status in (("idle", "never_called"), ("zero", "no_signal"), ("nan", "non_finite")):
        assert re.search(rf"{name} .* {status}", answer.out)
    assert "No ranks can be given: the budget of 8 ranks" in answer.out
    assert "exclude_modules" in answer.out


def test_inspect_json_of_a_calibration_that_went_wrong_has_no_nan(
    command: Command, partly: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(command("inspect", partly, "--json").out, parse_constant=refuse)
    assert "cannot be met" in facts["problem"]
    assert [row["attention"] for row in facts["layers"]] == [False, True, True, True]


def test_a_missing_file_to_inspect_is_named(command: Command, tmp_path: Path) -> None:
    refused(
        command("inspect", tmp_path / "missing.safetensors"), "missing.safetensors' does not exist"
    )


def test_an_empty_folder_to_inspect_is_named(command: Command, tmp_path: Path) -> None:
    refused(
        command("inspect", tmp_path),
        "holds neither calibration.safetensors nor adapter_model.safetensors",
    )


@pytest.mark.parametrize("size", [0, 4, 100, 2000])
def test_a_torn_calibration_is_refused(
    command: Command, written: Path, tmp_path: Path, size: int
) -> None:
    torn = tmp_path / "calibration.safetensors"
    torn.write_bytes((written / "calibration.safetensors").read_bytes()[:size])
    refused(command("inspect", torn), str(torn), "damaged", "again")
    refused(command("inspect", tmp_path), str(torn), "damaged", "again")


def test_a_file_of_another_kind_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not tensors at all")
    refused(command("inspect", tmp_path / "notes.txt"), "notes.txt", "not a safetensors file")


def test_foreign_safetensors_are_refused(command: Command, bert_folder: Path) -> None:
    refused(
        command("inspect", bert_folder / "model.safetensors"),
        "not an evatune calibration",
        "model.safetensors",
    )
