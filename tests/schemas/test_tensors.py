"""Containers of tensors: headers are held against the file, contents against a checksum."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import evatune
from evatune import Calibration, CalibrationConfig
from evatune.calibration.checkpoint import Checkpoint
from evatune.errors import RecordError
from evatune.schemas import FormatError
from evatune.schemas.tensors import read_header, read_tensors
from tests.calibration_files import contents, small_calibration
from tests.helpers import Toy, inputs


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return small_calibration()


@pytest.mark.parametrize("kind", ["calibration", "checkpoint"])
def test_no_flipped_bit_passes(kind: str, calibration: Calibration, tmp_path: Path) -> None:
    path, source = tmp_path / "file", random.Random(0)
    if kind == "calibration":
        calibration.save(path)
    else:
        evatune.calibrate(
            Toy(), inputs(), CalibrationConfig(rank=4), checkpoint=Checkpoint(path, every=1)
        )
    good = path.read_bytes()
    for _ in range(120):
        place = source.randrange(8 * len(good))
        raw = bytearray(good)
        raw[place // 8] ^= 1 << place % 8
        path.write_bytes(raw)
        with pytest.raises(RecordError, match=r"damaged|does not fit|format|read at most"):
            (
                Calibration.load(path)
                if kind == "calibration"
                else Checkpoint(path, resume=True).read({})
            )


def test_a_checksum_cannot_be_left_out(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "c")
    tensors, tree = contents(tmp_path / "c")
    for metadata in (
        {"format": "evatune-calibration-2"},
        {"format": "evatune-calibration-1", "sha256": "0" * 64},
    ):
        save_file(tensors, tmp_path / "c", metadata=metadata | {"record": json.dumps(tree)})
        with pytest.raises(RecordError, match="damaged"):
            Calibration.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"shape": [10**12]}, "not its size"),
        ({"shape": [2**40, 2**40]}, "not its size"),
        ({"shape": [-4]}, "greater than or equal to 0"),
        ({"shape": [4.0]}, "valid integer"),
        ({"data_offsets": [0, 10**13]}, "not its size"),
        ({"data_offsets": [16, 0]}, "not its size"),
        ({"dtype": "F64"}, "not its size"),
        ({"dtype": "Q1"}, "names the type 'Q1'"),
        ({"more": 1}, "unknown"),
    ],
)
def test_a_header_is_held_against_the_file_before_anything_is_allocated(
    entry: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}
    ).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    for read in (read_header, read_tensors):
        with pytest.raises(FormatError, match=reason):
            read(tmp_path / "x")
