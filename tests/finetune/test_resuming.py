"""Checkpoints of Trainer: what is damaged is told, and passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from evatune.finetune.resuming import newest_whole
from tests.fuzzing import fuzz


def test_the_newest_is_that_of_the_most_steps_by_number(tmp_path: Path) -> None:
    older = fuzz.write_trainer_state(tmp_path)
    newer = older.rename(tmp_path / "checkpoint-12")
    state = newer / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 4', '"global_step": 12'))
    fuzz.write_trainer_state(tmp_path)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-99").write_text("no folder")
    assert newest_whole(tmp_path) == newer


def test_without_checkpoints_a_run_begins_again(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None


@pytest.mark.parametrize(
    "file",
    [
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "adapter_model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped"])
def test_a_damaged_checkpoint_of_trainer_is_told_and_passed_over(
    file: str, damage: str, tmp_path: Path
) -> None:
    older, newer = fuzz.write_trainer_state(tmp_path), tmp_path / "checkpoint-12"
    assert newest_whole(tmp_path) == older
    older.rename(newer)
    state = newer / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 4', '"global_step": 12'))
    older = fuzz.write_trainer_state(tmp_path)
    assert newest_whole(tmp_path) == newer
    path = newer / file
    raw = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(raw[:-5])
    else:
        middle = len(raw) // 2 if path.suffix in (".pt", ".pth") else 3
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 64]) + raw[middle + 1 :])
    with pytest.warns(
        UserWarning, match=r"checkpoint-12' cannot be gone on from: it (holds|lacks|does not fit)"
    ):
        assert newest_whole(tmp_path) == older
    assert not newer.exists()  # so that it fails once only
