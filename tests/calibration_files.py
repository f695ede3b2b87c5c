"""Calibrations as files, changed before they are read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import evatune
from evatune import Calibration, CalibrationConfig
from tests.helpers import Toy, inputs


def small_calibration() -> Calibration:
    return evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4))


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    return load_file(path), json.loads(header["__metadata__"]["record"])


def load_changed(calibration: Calibration, folder: Path, change: Any) -> Calibration:
    """The calibration as a file of the format without a checksum, changed before it is read
    again."""
    path = folder / "c.safetensors"
    calibration.save(path)
    tensors, tree = contents(path)
    change(tensors, tree)
    save_file(
        tensors, path, metadata={"format": "evatune-calibration-1", "record": json.dumps(tree)}
    )
    return Calibration.load(path)
