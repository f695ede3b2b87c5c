"""Calibrations that are interrupted, killed and resumed."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import evatune
from evatune import Calibration, CalibrationConfig
from evatune.calibration.checkpoint import Checkpoint
from evatune.errors import ConfigError, DataError, RecordError
from evatune.schemas.tensors import read_sealed, save_sealed
from evatune.sketch import SKETCHES
from tests.helpers import EXACT, Toy, inputs
from tests.processes import FORKS


class Interrupted(Exception):
    pass


def config(**options: Any) -> CalibrationConfig:
    return CalibrationConfig(**{"rank": 4, "max_batches": 16, "tolerance": 0} | options)


def require_same(a: Calibration, b: Calibration) -> None:
    """Bit for bit, but for the library's versions."""
    assert (a.status, a.layers, a.config, a.batches) == (b.status, b.layers, b.config, b.batches)
    assert a.estimated_missed == b.estimated_missed
    for name, spectrum in a.spectra.items():
        other = b.spectra[name].state()
        assert spectrum.state().keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in spectrum.state().items()), (
            name
        )


def rewrite(point: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the record of a checkpoint, and seal it again."""
    kind = "evatune-checkpoint-3"
    tensors, text = read_sealed(point, [kind], "a checkpoint")
    record = json.loads(text)
    change(record)
    save_sealed(point, tensors, kind, json.dumps(record))


def interrupted(
    path: Path, after: int, data: list[torch.Tensor], settings: CalibrationConfig, every: int = 1
) -> None:
    def progress(now: evatune.Progress) -> None:
        if now.batch == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        evatune.calibrate(
            Toy(), data, settings, progress=progress, checkpoint=Checkpoint(path, every)
        )


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("sketch", SKETCHES)
def test_resumed_anywhere_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, sketch: str, center: bool
) -> None:
    data, settings = inputs(10), config(sketch=sketch, center=center)
    whole = evatune.calibrate(Toy(), data, settings)
    for after in range(2 + center, 11, 2):  # each sketch at every batch, every other one centered
        path = tmp_path / f"{after}"
        interrupted(path, after, data, settings, every=2 if after > 2 else 1)
        require_same(
            whole,
            evatune.calibrate(Toy(), data, settings, checkpoint=Checkpoint(path, 3, resume=True)),
        )


def test_the_stop_rule_goes_on_too(tmp_path: Path) -> None:
    data, settings = inputs(40), config(tolerance=0.002, max_batches=64)
    whole = evatune.calibrate(Toy(), data, settings)
    assert 4 < whole.batches < 40
    for after in (3, 5, whole.batches - 1, whole.batches):
        interrupted(tmp_path / f"{after}", after, data, settings)
        resumed = evatune.calibrate(
            Toy(), data, settings, checkpoint=Checkpoint(tmp_path / f"{after}", resume=True)
        )
        require_same(whole, resumed)


def test_bad_rows_stay_bad(tmp_path: Path) -> None:
    data, settings = inputs(8), config()
    data[1][0, 0, 0] = float("inf")
    whole = evatune.calibrate(Toy(), data, settings)
    interrupted(tmp_path / "c", 5, data, settings)
    require_same(
        whole,
        evatune.calibrate(
            Toy(), data, settings, checkpoint=Checkpoint(tmp_path / "c", resume=True)
        ),
    )


class Late(torch.nn.Module):
    """One of its layers is called from the sixth batch on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
        y = self.early(x)
        return self.late(y) if number > 5 else y


def test_layers_that_came_after_the_last_check(tmp_path: Path) -> None:
    data = [(x, number) for number, x in enumerate(inputs(20), start=1)]
    settings = config(tolerance=1e-6, max_batches=20)
    whole = evatune.calibrate(Late(), data, settings)
    for after in (6, 8, 11):

        def progress(now: evatune.Progress, after: int = after) -> None:
            if now.batch == after:
                raise Interrupted

        point = Checkpoint(tmp_path / f"{after}", 1)
        with pytest.raises(Interrupted):
            evatune.calibrate(Late(), data, settings, progress=progress, checkpoint=point)
        resumed = evatune.calibrate(
            Late(), data, settings, checkpoint=Checkpoint(point.path, resume=True)
        )
        require_same(whole, resumed)


def calibrated_slowly(folder: str) -> None:
    """Go on with a calibration, and save it."""
    torch.set_num_threads(1)

    def forward(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return model(batch)

    point = Checkpoint(Path(folder, "point"), every=1, resume=True)
    settings = config(max_batches=40)
    calibration = evatune.calibrate(Toy(), inputs(40), settings, forward=forward, checkpoint=point)
    calibration.save(Path(folder, "out"))


def test_killed_at_random_moments_it_resumes_and_ends_the_same(tmp_path: Path) -> None:
    whole = evatune.calibrate(
        Toy(), inputs(40), config(max_batches=40), forward=lambda model, batch: model(batch)
    )
    moments, kills = random.Random(0), 0
    for _ in range(12):
        before = (tmp_path / "point").stat().st_mtime_ns if (tmp_path / "point").exists() else 0
        process = FORKS.Process(target=calibrated_slowly, args=(str(tmp_path),))
        process.start()
        end = time.monotonic() + 60
        # Once it is at work, wherever in a batch or in the writing of a file it may be.
        while process.exitcode is None and time.monotonic() < end:
            if (
                (tmp_path / "point").exists()
                and (tmp_path / "point").stat().st_mtime_ns > before
                and kills < 3
            ):
                time.sleep(moments.uniform(0, 0.4))
                process.kill()
                process.join()
            time.sleep(0.005)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills == 3
    require_same(whole, Calibration.load(tmp_path / "out"))
    Checkpoint(tmp_path / "point").remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestWhatDoesNotFit:
    @pytest.fixture
    def point(self, tmp_path: Path) -> Path:
        interrupted(tmp_path / "point", 5, inputs(8), config())
        return tmp_path / "point"

    def resume(
        self, point: Path, model: torch.nn.Module | None = None, **options: Any
    ) -> Calibration:
        about = options.pop("about", {})
        return evatune.calibrate(
            model or Toy(),
            options.pop("data", inputs(8)),
            config(**options),
            checkpoint=Checkpoint(point, resume=True, about=about),
        )

    def test_other_settings_are_named(self, point: Path) -> None:
        with pytest.raises(
            ConfigError, match="config seed was 0 and is 1; resume with the same options and data"
        ):
            self.resume(point, seed=1)
        with pytest.raises(ConfigError, match="model was Toy and is Sequential"):
            self.resume(point, torch.nn.Sequential(torch.nn.Linear(16, 16)))
        with pytest.raises(ConfigError, match="texts was None and is abc"):
            self.resume(point, about={"texts": "abc"})

    def test_other_weights_are_named(self, point: Path) -> None:
        model = Toy()
        with torch.no_grad():
            model.blocks[1].up.weight += 1
        with pytest.raises(ConfigError, match=r"weights blocks\.1\.up\.weight was"):
            self.resume(point, model)

    def test_data_that_is_shorter_now(self, point: Path) -> None:
        with pytest.raises(
            DataError, match="ended after 3 batches, but 4 were seen before the interruption"
        ):
            self.resume(point, data=inputs(3))

    @pytest.mark.parametrize("damage", ["cut", "text", "foreign", "record"])
    def test_damaged_files(self, point: Path, damage: str) -> None:
        if damage == "cut":
            point.write_bytes(point.read_bytes()[:-100])
        elif damage == "text":
            point.write_text("not a checkpoint")
        elif damage == "foreign":
            save_file({"a": torch.zeros(1)}, point)
        else:
            save_file(
                {"a": torch.zeros(1)},
                point,
                metadata={"format": "evatune-checkpoint-1", "record": json.dumps({})},
            )
        with pytest.raises(RecordError, match="--resume"):
            self.resume(point)

    def test_a_drifting_layer_that_there_is_not(self, point: Path) -> None:
        rewrite(point, lambda record: record["drifting"].append("none"))
        with pytest.raises(RecordError, match="'none' is no layer of the record"):
            self.resume(point)

    def test_a_record_without_drifting_layers_is_read(self, point: Path) -> None:
        rewrite(point, lambda record: record.pop("drifting"))
        assert self.resume(point).batches == 8

    def test_nothing_to_resume_is_a_start(self, tmp_path: Path) -> None:
        assert self.resume(tmp_path / "none").batches == 8

    def test_never_is_not_a_number_of_batches(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="checkpoint_every is 0"):
            Checkpoint(tmp_path / "point", every=0)


def test_a_path_may_be_text(tmp_path: Path) -> None:
    where = str(tmp_path / "checkpoint")
    for resume in (True, False, True):
        checkpoint = Checkpoint(where, every=2, resume=resume)  # type: ignore[arg-type]
        evatune.calibrate(Toy(), inputs(), EXACT, checkpoint=checkpoint, progress=None)
    for every in (0, 2.5, "8", True):
        with pytest.raises(ConfigError, match=r"must be a whole number of at least 1 batch"):
            Checkpoint(tmp_path, every=every)  # type: ignore[arg-type]
