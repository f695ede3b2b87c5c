"""The stop rule, the statuses and the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig, Status
from evatune.adapters.scale import SCALES, scaled_rows
from evatune.errors import ConfigError, LayerError, RecordError
from evatune.report.summary import layer_rows
from tests.helpers import Toy, inputs, tiny_bert, tokens

torch.set_num_threads(1)


# -- stop rule -------------------------------------------------------------------------------------


def test_stops_when_directions_and_ranks_have_settled() -> None:
    calibration = evatune.calibrate(Toy(), inputs(200, rows=256), CalibrationConfig(rank=4))
    assert calibration.batches < 64
    assert set(calibration.status.values()) <= {Status.CONVERGED, Status.UNSETTLED}
    assert Status.CONVERGED in calibration.status.values()


def test_tolerance_zero_never_stops_early() -> None:
    calibration = evatune.calibrate(
        Toy(), inputs(200), CalibrationConfig(rank=4, tolerance=0, max_batches=37)
    )
    assert calibration.batches == 37
    assert set(calibration.status.values()) == {Status.MAX_BATCHES}


def test_data_that_ends_first_is_a_status_and_the_result_stands() -> None:
    calibration = evatune.calibrate(Toy(), inputs(3), CalibrationConfig(rank=4, tolerance=0))
    assert set(calibration.status.values()) == {Status.DATA_EXHAUSTED}
    assert sum(calibration.allocate().ranks.values()) == 4 * 10


def test_data_that_never_settles_ends_at_max_batches() -> None:
    """Fresh directions all the time: what has been learnt says nothing about what comes."""

    def drifting() -> Any:
        for number in range(1000):
            x = torch.zeros(4, 16, 16)
            x[..., number % 16] = 4.0 ** (number % 16)
            yield x + 0.01 * torch.randn(4, 16, 16)

    calibration = evatune.calibrate(
        Toy(), drifting(), CalibrationConfig(rank=2, max_batches=12, tolerance=1e-6)
    )
    assert calibration.batches == 12


def test_near_equal_energies_do_not_keep_it_running() -> None:
    """Directions of equal energy rotate for ever; the space they span does not matter here
    either."""
    generator = torch.Generator().manual_seed(0)
    xs = (torch.randn(4, 256, 16, generator=generator) for _ in range(200))
    assert evatune.calibrate(Toy(), xs, CalibrationConfig(rank=4, tolerance=0.02)).batches <= 32


def test_progress_is_told_after_each_batch() -> None:
    seen: list[evatune.Progress] = []
    evatune.calibrate(
        Toy(), inputs(5), CalibrationConfig(rank=4, tolerance=0), progress=seen.append
    )
    assert [p.batch for p in seen] == [1, 2, 3, 4, 5]
    assert {p.layers for p in seen} == {10}


# -- statuses --------------------------------------------------------------------------------------


class Odd(nn.Module):
    """One layer of each fate."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.zero, self.nan, self.few, self.unused = (nn.Linear(8, 8) for _ in range(5))
        self.calls = 0

    def forward(self, x: Tensor) -> None:
        self.calls += 1
        self.fine(x)
        self.zero(x * 0)
        self.nan(x / 0 if self.calls == 3 else x * 1.5)
        if self.calls == 2:
            self.few(x[:1] * 2)


def odd_calibration() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(40, 8, generator=generator) for _ in range(6)]
    return evatune.calibrate(Odd(), xs, CalibrationConfig(rank=2, tolerance=0))


def test_every_outcome_has_a_name_and_advice() -> None:
    calibration = odd_calibration()
    assert calibration.status == {
        "fine": "data_exhausted",
        "zero": "no_signal",
        "nan": "non_finite",
        "few": "too_few_rows",
        "unused": "never_called",
    }
    assert list(calibration.spectra) == list(calibration.status)
    assert all(status.advice for status in Status)


def test_layers_that_cannot_be_initialized_are_listed_with_the_batch_and_what_to_try() -> None:
    with pytest.raises(LayerError) as caught:
        odd_calibration().require_usable()
    message = str(caught.value)
    assert message.startswith("4 of 5 layers cannot be initialized")
    for part in (
        "nan (first in batch 3)",
        "few (1 rows for 4 components)",
        "zero",
        "unused",
        "exclude_modules",
    ):
        assert part in message


def test_a_layer_with_bad_rows_does_not_spoil_the_others() -> None:
    calibration = odd_calibration()
    assert calibration.spectra["fine"].rows == 240
    assert calibration.spectra["nan"].rows == 0
    assert torch.isfinite(calibration.spectra["fine"].energies).all()


def test_short_batches_count_and_never_hang() -> None:
    xs = [torch.randn(1, 3, 16) for _ in range(40)]
    calibration = evatune.calibrate(Toy(), xs, CalibrationConfig(rank=8, tolerance=0))
    assert calibration.spectra["blocks.0.q"].rows == 120
    assert set(calibration.status.values()) == {Status.DATA_EXHAUSTED}


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
def test_every_sketch_runs_the_whole_way(sketch: str) -> None:
    calibration = evatune.calibrate(
        tiny_bert(), tokens(8), CalibrationConfig(rank=4, sketch=sketch, center=True)
    )
    assert sum(calibration.allocate().ranks.values()) == 4 * len(calibration.layers)


def test_more_components_than_features_is_fine() -> None:
    calibration = evatune.calibrate(Toy(), inputs(), CalibrationConfig(components=500))
    assert calibration.spectra["blocks.0.q"].directions.shape == (16, 16)
    assert calibration.spectra["blocks.0.down"].directions.shape == (32, 32)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rho": 0.99}, "rho is 0.99"),
        ({"components": 0}, "components is 0"),
        ({"max_batches": 0}, "max_batches is 0"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
        ({"oversampling": -1}, "oversampling is -1"),
        ({"sketch": "svd"}, "choose one of nystrom, exact, incremental"),
        ({"budget": "x"}, "choose one of ranks, parameters"),
        ({"metric": "x"}, "choose one of ratio, raw, max, sum"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CalibrationConfig(**options)


# -- determinism -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits() -> None:
    one, two = (
        evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4, seed=3)) for _ in range(2)
    )
    for name in one.spectra:
        assert torch.equal(one.spectra[name].directions, two.spectra[name].directions)


# -- record ----------------------------------------------------------------------------------------


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
    odd_calibration().save(path)
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


@pytest.mark.parametrize(
    "options",
    [
        {"rho": float("inf")},
        {"rho": "2"},
        {"rank": 2.5},
        {"rank": "16"},
        {"components": 2.5},
        {"max_batches": 2.5},
        {"oversampling": 1.5},
        {"seed": 1.5},
        {"seed": -1},
    ],
)
def test_settings_of_the_wrong_kind_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        CalibrationConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"rho": float("inf")}, {"rank": 2.5}, {"min_rank": 1.5}, {"metric": ""}, {"budget": ""}],
)
def test_allocate_names_options_of_the_wrong_kind(options: dict[str, Any]) -> None:
    calibration = evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4))
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        calibration.allocate(**options)


def test_a_large_seed_is_fine() -> None:
    assert evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4, seed=2**62)).batches == 6


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


def test_a_loaders_seed_is_not_drawn_from_the_callers_random_state() -> None:
    loader = torch.utils.data.DataLoader(torch.cat(inputs()), batch_size=4, shuffle=True)
    before = torch.random.get_rng_state()
    evatune.calibrate(Toy(), loader, CalibrationConfig(rank=4))
    assert torch.equal(torch.random.get_rng_state(), before)


# -- data that comes sorted, and numbers far from 1 ------------------------------------------------


def kinds(*numbers: int) -> list[Tensor]:
    """Batches whose rows lie in one of several spaces, by the number of the kind."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0].reshape(4, 8, 32)
    return [torch.randn(64, 8, generator=generator) @ axes[number] for number in numbers]


SORTED, MIXED = kinds(*([0] * 9 + [1] * 7)), kinds(*([0, 1] * 8))
WHOLE = CalibrationConfig(rank=4, tolerance=0, max_batches=16)


def statuses(batches: list[Tensor], config: CalibrationConfig = WHOLE) -> set[str]:
    return set(evatune.calibrate(nn.Sequential(nn.Linear(32, 32)), batches, config).status.values())


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
def test_late_batches_captured_worse_than_promised_are_a_status(sketch: str) -> None:
    config = CalibrationConfig(rank=4, tolerance=0, max_batches=16, sketch=sketch)
    assert statuses(SORTED, config) == {Status.DRIFTING}
    assert statuses(MIXED, config) == {Status.MAX_BATCHES}


def test_another_kind_that_comes_after_the_last_refresh_is_seen_too() -> None:
    assert statuses(kinds(*([0] * 12), 1)) == {Status.DRIFTING}
    assert statuses(kinds(*([0] * 13))) == {Status.DATA_EXHAUSTED}


def test_rows_that_grow_longer_or_have_no_directions_of_their_own_are_no_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(1.0, 1.6, 16)
    # longer, not elsewhere
    swelling = [scale * batch for scale, batch in zip(scales, kinds(*([0] * 16)), strict=True)]
    assert statuses(swelling) == {Status.MAX_BATCHES}
    assert statuses([torch.randn(64, 32, generator=generator) for _ in range(16)]) == {
        Status.MAX_BATCHES
    }


def test_a_drifting_layer_can_be_used_is_shown_and_survives_a_merge_and_a_file(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    found = evatune.calibrate(model, SORTED, WHOLE)
    found.require_usable()
    merged = Calibration.merge([found, evatune.calibrate(model, kinds(*([0] * 6)), WHOLE)])
    assert merged.status == {"0": Status.DRIFTING}
    merged.save(tmp_path / "merged.safetensors")
    assert Calibration.load(tmp_path / "merged.safetensors").status == {"0": Status.DRIFTING}
    (row,) = layer_rows(found, found.allocate())
    assert row.attention
    assert "shuffle" in row.advice


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
        unit = 1.0 if scale == "paper" else 1 / factor if scale == "whiten" else 1.0
        far, near = scaled_rows(known, 4, scale), scaled_rows(usual, 4, scale)
        assert torch.allclose(far / unit, near, rtol=1e-3, atol=1e-4), scale
