"""Records of calibrations: what contradicts itself is refused in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from evatune import Calibration
from evatune.calibration.convergence import Estimate
from evatune.calibration.data import CalibratedLayer
from evatune.errors import RecordError
from evatune.layers import LayerSpec
from evatune.schemas import record
from tests.calibration_files import load_changed, small_calibration

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return small_calibration()


def test_files_of_the_first_format_are_read() -> None:
    unsupported = Calibration.load(DATA / "calibration-1.safetensors")
    assert list(unsupported.status.values()) == [
        "data_exhausted",
        "no_signal",
        "non_finite",
        "too_few_rows",
        "never_called",
    ]
    assert unsupported.layers["nan"].first_bad_batch == 3
    centered = Calibration.load(DATA / "calibration-1-centered.safetensors")
    assert centered.config.center
    assert set(centered.allocate().ranks) == set(centered.layers)


def test_what_is_saved_and_unchanged_is_read(calibration: Calibration, tmp_path: Path) -> None:
    assert load_changed(calibration, tmp_path, lambda *_: None).layers == calibration.layers


FACTS: list[tuple[str, Any]] = [
    ("batches", -5),
    ("batches", 1.5),
    ("batches", "4"),
    ("batches", None),
    ("batches", 10**20),
    ("batches", True),
    ("processes", 0),
    ("processes", "2"),
    ("bytes_sent", -1),
    ("versions", ["x"]),
    ("model", 5),
    ("surprise", 1),
    ("inputs.0.total_energy", -1.0),
    ("inputs.0.total_energy", float("nan")),
    ("inputs.0.total_energy", 1e-9),
    ("inputs.0.rows", 0),
    ("inputs.0.rows", 2.5),
    ("inputs.0.fresh_rows", 10**6),
    ("inputs.0.fresh_rows", None),
    ("inputs.0.fresh_total_energy", 1e-9),
    ("inputs.0.fresh_total_energy", 1e9),
    ("inputs.0.more", 1),
    ("inputs.7", {"total_energy": 1.0, "rows": 3}),
    ("config.rank", 0),
    ("config.rank", "4"),
    ("config.seed", 2**63),
    ("config.sketch", "best"),
    ("config.tolerance", float("inf")),
    ("config.components", 1),
    ("layers.blocks/0/q.in_features", 8),
    ("layers.blocks/0/q.in_features", 10**12),
    ("layers.blocks/0/q.out_features", 0),
    ("layers.blocks/0/q.input", 77),
    ("layers.blocks/0/q.input", None),
    ("layers.blocks/0/q.status", "fine"),
    ("layers.blocks/0/q.status", "never_called"),
    ("layers.blocks/0/q.first_bad_batch", 2),
    ("layers.blocks/0/q.bad_process", 0),
    ("layers.blocks/0/q.groups", 0),
    ("layers.blocks/0/q.cap", 1.5),
    ("layers.blocks/0/q.unit", None),
    ("layers.blocks/0/q.estimated_missed", -0.1),
    ("estimated_missed", 1.5),
    ("estimated_missed", "0.1"),
]


@pytest.mark.parametrize(("key", "value"), FACTS, ids=[f"{key}={value}" for key, value in FACTS])
def test_a_record_that_contradicts_itself_is_refused(
    key: str, value: Any, calibration: Calibration, tmp_path: Path
) -> None:
    def change(_: Any, tree: dict[str, Any]) -> None:
        *parents, last = (part.replace("/", ".") for part in key.split("."))
        for parent in parents:
            tree = tree[parent]
        tree[last] = value

    with pytest.raises(
        RecordError, match=r"c\.safetensors.* its record is damaged: it [^\n]+; give the"
    ):
        load_changed(calibration, tmp_path, change)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("energies", lambda x: -x, "energies are negative or rise"),
        ("energies", lambda x: x.flip(0), "energies are negative or rise"),
        ("energies", lambda x: x * 1.5, "energies are more than the total"),
        ("energies", lambda x: x.half(), "of another type"),
        ("energies", lambda x: x[:-1], "do not fit each other"),
        ("directions", lambda x: x * 1.01, "not orthonormal"),
        ("directions", lambda x: x[[0, *range(len(x) - 1)]], "not orthonormal"),
        ("directions", lambda x: x * float("nan"), "NaN"),
        ("directions", lambda x: torch.zeros(10**9, 0), "do not fit each other"),
        ("mean", lambda x: x + 10, "the mean has more energy"),
        ("fresh_energies", lambda x: x * 3, "more than the total"),
        ("fresh_energies", lambda x: torch.cat([x, x, x, x]), "an energy per component"),
        ("more", lambda x: torch.zeros(3), "what the tensor '0.more' is"),
    ],
)
def test_tensors_that_no_sketch_could_have_found_are_refused(
    name: str, change: Any, reason: str, calibration: Calibration, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, torch.Tensor], _: Any) -> None:
        key = f"0.{name}"
        tensors[key] = change(tensors.get(key)).contiguous()

    with pytest.raises(RecordError, match=reason):
        load_changed(calibration, tmp_path, edit)


def test_the_schemas_know_every_field_that_is_written() -> None:
    def fields(kind: type) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    layer = fields(CalibratedLayer) | fields(LayerSpec) | {"status"}
    assert record.LayerRecord.model_fields.keys() == layer - {"spec", "name"}
    assert record.EstimateRecord.model_fields.keys() == set(Estimate._fields)
