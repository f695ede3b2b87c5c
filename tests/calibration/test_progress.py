"""What a calibration tells of itself."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import evatune
from evatune import CalibrationConfig
from evatune.calibration.progress import progress_callback
from evatune.errors import ConfigError
from evatune.utils import progress
from tests.helpers import Toy, inputs


@pytest.mark.parametrize(
    ("tolerance", "before", "after"),
    [
        (0, "6 inputs, 5 batches, about 15 s, ", "calibrated on 5 batches in 15 s"),
        (
            0.01,
            "6 inputs, 4 to 5 batches until directions settle, about 15 s at most, ",
            "calibrated on 4 batches in 12 s, 10 of 10 layers settled",
        ),
    ],
)
def test_a_long_run_says_what_it_will_take_and_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tolerance: float,
    before: str,
    after: str,
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))

    def forward(model: torch.nn.Module, batch: Any) -> None:
        nonlocal now
        now += 3.0
        model(batch)

    config = CalibrationConfig(rank=4, tolerance=tolerance)
    with caplog.at_level(logging.INFO, "evatune"):
        evatune.calibrate(Toy(), inputs(5), config, forward=forward)
    first, *_, last = [record.message for record in caplog.records]
    assert first.startswith(before)
    assert first.endswith(" of sketches")
    assert last == after


def test_progress_counts_inputs_and_their_memory() -> None:
    seen: list[evatune.Progress] = []
    config = CalibrationConfig(rank=4, tolerance=0)
    calibration = evatune.calibrate(Toy(), inputs(3), config, progress=seen.append)
    assert {now.inputs for now in seen} == {
        len({layer.input for layer in calibration.layers.values()})
    }
    assert {now.max_batches for now in seen} == {3}
    widths = {layer.input: layer.in_features for layer in calibration.layers.values()}
    columns = {
        width: min(width, config.n_components + config.oversampling) for width in widths.values()
    }
    least = 4 * sum(2 * width * columns[width] for width in widths.values())  # basis and sums
    assert seen[-1].sketch_bytes > least
    evatune.calibrate(Toy(), (x for x in inputs(3)), config, progress=seen.append)
    assert seen[-1].max_batches == config.max_batches


def test_another_process_than_the_first_and_none_show_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CalibrationConfig()
    with progress_callback(None, config) as report:
        assert report is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with progress_callback("auto", config) as report:
        assert report is None
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with progress_callback("auto", config) as report:
        assert report is not None
    with progress_callback("auto", config, runs=False) as report:
        assert report is None


@pytest.mark.parametrize("value", ["bar", True, 3])
def test_another_value_of_progress_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        evatune.calibrate(Toy(), inputs(1), progress=value)
    assert str(error.value) == (
        f"progress is {value!r}; it must be 'auto', None, or a function of one evatune.Progress"
    )
