"""Calibrations in files: what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig, Status
from evatune.choices import SCALES
from evatune.errors import ConfigError, RecordError
from evatune.scaling import scaled_rows
from tests.helpers import Toy, every_outcome, inputs


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    calibration = evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4, center=True, seed=7))
    path = tmp_path / "new" / "calibration.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert (loaded.config, loaded.status, loaded.layers) == (
        calibration.config,
        calibration.status,
        calibration.layers,
    )
    assert loaded.versions == calibration.versions
    assert calibration.estimated_missed is not None
    assert loaded.estimated_missed == calibration.estimated_missed
    assert all(layer.estimated_missed for layer in loaded.layers.values())
    assert loaded.allocate() == calibration.allocate()
    for name, spectrum in calibration.spectra.items():
        other = loaded.spectra[name]
        assert torch.equal(other.directions, spectrum.directions)
        assert torch.equal(other.energies, spectrum.energies)
        assert torch.equal(other.mean, spectrum.mean)
        assert other.certificate.captured() == spectrum.certificate.captured()  # type: ignore[union-attr]
        assert (other.total_energy, other.rows, other.centered) == (
            spectrum.total_energy,
            spectrum.rows,
            True,
        )
    assert list(path.parent.iterdir()) == [path]


def test_layers_that_share_an_input_are_stored_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "c.safetensors"
    evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4)).save(path)
    with safe_open(path, framework="pt") as file:
        assert sum(key.endswith("directions") for key in file.keys()) == 6  # noqa: SIM118  not a mapping


def test_odd_fates_survive_the_record(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    every_outcome().save(path)
    loaded = Calibration.load(path)
    assert loaded.status["unused"] is Status.NEVER_CALLED
    assert loaded.spectra["unused"].directions.shape == (0, 8)
    assert loaded.layers["nan"].first_bad_batch == 3


def broken_files(folder: Path) -> dict[str, Path]:
    good = folder / "good.safetensors"
    evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4)).save(good)
    files = {
        name: folder / f"{name}.safetensors"
        for name in ("text", "empty", "cut", "foreign", "record", "missing")
    }
    files["text"].write_text("not a tensor in sight")
    files["empty"].write_bytes(b"")
    files["cut"].write_bytes(good.read_bytes()[:-100])
    save_file({"a": torch.zeros(2)}, files["foreign"])
    save_file(
        {"a": torch.zeros(2)},
        files["record"],
        metadata={"format": "evatune-calibration-1", "record": "{}"},
    )
    return files


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "foreign", "record", "missing"])
def test_a_file_that_is_not_a_calibration_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = broken_files(tmp_path)[kind]
    with pytest.raises(RecordError, match=path.name):
        Calibration.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4))
    path = tmp_path / "c.safetensors"
    path.write_text("precious")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("evatune.schemas.tensors.save_file", full)
    with pytest.raises(ConfigError, match="no space"):
        calibration.save(path)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["inputs", "layers", "in_features", "total_energy", "rows"])
def test_a_record_with_damaged_contents_is_refused(damage: str, tmp_path: Path) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file

    path = tmp_path / "c.safetensors"
    evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4)).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["record"])
    if damage in ("inputs", "layers"):
        record[damage] = None
    elif damage == "in_features":
        next(iter(record["layers"].values()))[damage] = -5
    else:
        next(iter(record["inputs"].values()))[damage] = "x"
    # the one without a checksum
    metadata = {"format": "evatune-calibration-1", "record": json.dumps(record)}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(RecordError, match="its record is damaged"):
        Calibration.load(path)


@pytest.mark.parametrize("factor", [1e19, 1e-25])
def test_finite_numbers_far_from_one_are_calibrated_saved_and_scaled_like_any(
    factor: float, tmp_path: Path
) -> None:
    few = CalibrationConfig(rank=2)
    plain = evatune.calibrate(nn.Sequential(nn.Linear(16, 4)), inputs(), few)
    found = evatune.calibrate(nn.Sequential(nn.Linear(16, 4)), [factor * x for x in inputs()], few)
    assert found.status == plain.status
    assert found.allocate().ranks == plain.allocate().ranks
    found.save(tmp_path / "far.safetensors")
    known, usual = Calibration.load(tmp_path / "far.safetensors").spectra["0"], plain.spectra["0"]
    assert torch.equal(known.energies, found.spectra["0"].energies)
    assert torch.allclose(known.energies / factor**2, usual.energies.double(), rtol=1e-4)
    assert torch.allclose(known.explained_variance_ratio, usual.explained_variance_ratio, rtol=1e-4)
    merged = Calibration.merge([found, found]).spectra["0"]
    assert torch.allclose(merged.energies, known.energies, rtol=1e-5)
    for scale in SCALES:
        unit = 1 / factor if scale == "whiten" else 1.0
        far, near = scaled_rows(known, 4, scale), scaled_rows(usual, 4, scale)
        assert torch.allclose(far / unit, near, rtol=1e-3, atol=1e-4), scale


def test_inputs_that_parted_in_another_shard_are_saved_though_they_have_one_certificate(
    tmp_path: Path,
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.q(x) + self.k(x)
            return out

    def apart(model: Any, x: Tensor) -> None:
        model.q(0 * x), model.k(0 * x)

    torch.manual_seed(0)
    model, config = Model(), CalibrationConfig(rank=2, tolerance=0)
    batches = [torch.randn(16, 8) for _ in range(4)]
    shared = evatune.calibrate(model, batches, config, progress=None)
    parted = evatune.calibrate(model, batches, config, progress=None, forward=apart)
    merged = Calibration.merge([shared, parted])
    merged.save(tmp_path / "c.safetensors")
    assert Calibration.load(tmp_path / "c.safetensors").status == merged.status


def test_paths_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        Calibration.load("a" * 5000)
    (tmp_path / "file").write_text("")
    saved = every_outcome()
    for path in (str(tmp_path / "file" / "c.safetensors"), str(tmp_path / "a\0b")):
        with pytest.raises(ConfigError, match="cannot be written"):
            saved.save(path)
