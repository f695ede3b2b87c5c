"""`evatune merge`: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evatune import Calibration
from evatune.calibration.merge import loss_bounds
from tests.calibration_shards import SHARDS, of_rows, routed
from tests.conftest import Command, refused


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two calibrations as files, and one in a folder, as `evatune init` writes it."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c"]
    paths[2].mkdir()
    for rows, path in zip(SHARDS, paths, strict=True):
        of_rows(rows).save(path / "calibration.safetensors" if path.is_dir() else path)
    return paths


def test_the_command_writes_what_the_library_computes(
    command: Command, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "merged.safetensors"
    answer = command("merge", *files, "-o", out)
    assert (answer.status, answer.err) == (0, "")
    assert "800" in answer.out
    assert "merged.safetensors" in answer.out
    assert [path.name for path in out.parent.iterdir()] == ["merged.safetensors"]
    expected = Calibration.merge([of_rows(rows) for rows in SHARDS]).spectra["layer"]
    assert torch.equal(Calibration.load(out).spectra["layer"].directions, expected.directions)
    assert command("inspect", out).status == 0


def test_json_says_what_was_joined_and_what_it_can_have_lost(
    command: Command, files: list[Path], tmp_path: Path
) -> None:
    facts = json.loads(command("merge", *files, "-o", tmp_path / "m.safetensors", "--json").out)
    assert [shard["batches"] for shard in facts["shards"]] == [3, 8, 5]
    assert facts["totals"]["batches"] == 16
    assert facts["out"] == str(tmp_path / "m.safetensors")
    parts = [of_rows(rows) for rows in SHARDS]
    merged = Calibration.merge(parts)
    assert (
        facts["loss_bounds"]["layer"]
        == loss_bounds(merged, parts, merged.allocate().ranks)["layer"]._asdict()
    )


def test_what_a_shard_does_not_know_is_named(command: Command, tmp_path: Path) -> None:
    for name, fate in (("a", "fine"), ("b", "zero")):
        routed(layer=fate).save(tmp_path / f"{name}.safetensors")
    answer = command(
        "merge",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "-o",
        tmp_path / "m.safetensors",
    )
    assert answer.status == 0
    assert f"layer: no_signal in {tmp_path / 'b.safetensors'}" in answer.out


def test_an_existing_file_is_replaced_on_demand_and_only_if_it_is_ours(
    command: Command, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    out.write_text("precious")
    for flags, text in (
        ((), "exists; name another with --out"),
        (("--overwrite",), "was not written by evatune"),
    ):
        refused(command("merge", *files, "-o", out, *flags), text)
        assert out.read_text() == "precious"
    out.unlink()
    assert command("merge", *files, "-o", out).status == 0
    refused(command("merge", *files, "-o", out), "--overwrite")
    assert command("merge", *files[:2], "-o", out, "--overwrite").status == 0
    assert Calibration.load(out).spectra["layer"].rows == 550
    refused(
        command("merge", *files, "-o", files[0], "--overwrite"),
        "is one of the calibrations to merge",
    )
    refused(command("merge", *files, "-o", tmp_path), "is a folder")
    refused(command("merge", *files, "-o", out / "x.safetensors"), "cannot be written")


def test_bad_shards_are_refused_in_one_sentence(
    command: Command, files: list[Path], tmp_path: Path
) -> None:
    out, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    refused(command("merge", files[0], "-o", out), "1 calibrations")
    refused(command("merge", files[0], files[0], "-o", out), "a.safetensors", "twice")
    refused(command("merge", files[0], tmp_path / "absent", "-o", out), "absent' is not a file")
    bad.write_bytes(files[0].read_bytes()[:-50])
    refused(command("merge", files[0], bad, "-o", out), "bad.safetensors' is damaged")
    save_file({"a": torch.zeros(2)}, bad)
    refused(
        command("merge", files[0], bad, "-o", out),
        "bad.safetensors' is a safetensors file but not an evatune calib",
    )
    broken = of_rows(SHARDS[0])
    broken.spectra["layer"].energies[0] = float("nan")
    broken.save(bad)
    refused(command("merge", files[0], bad, "-o", out), "bad.safetensors", "NaN")
    of_rows(SHARDS[0], center=True).save(bad)
    refused(
        command("merge", files[0], bad, "-o", out),
        "its center is True and that of calibration 1 is False",
    )
    assert not out.exists()
