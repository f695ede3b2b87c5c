"""Every outcome of a layer has a name and advice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig, Status
from tests.helpers import every_outcome


def test_every_outcome_has_a_name_and_advice() -> None:
    calibration = every_outcome()
    assert calibration.status == {
        "fine": "data_exhausted",
        "zero": "no_signal",
        "nan": "non_finite",
        "few": "too_few_rows",
        "unused": "never_called",
    }
    assert list(calibration.spectra) == list(calibration.status)
    assert all(status.advice for status in Status)


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1000.1])
def test_an_input_that_never_varies_has_no_signal_about_its_mean(sketch: Any, value: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant, self.varying = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            row = value * torch.linspace(0.5, 1.5, 16)
            out: Tensor = self.constant(row.expand(len(x), -1)) + self.varying(x)
            return out

    config = CalibrationConfig(rank=2, center=True, sketch=sketch)
    batches = [torch.randn(8, 16) for _ in range(4)]
    calibration = evatune.calibrate(Model(), batches, config, progress=None)
    assert calibration.status["constant"] is Status.NO_SIGNAL
    assert calibration.spectra["constant"].total_energy == 0
    assert calibration.spectra["constant"].energies.sum() == 0
    assert calibration.allocate().ranks["constant"] == 0
    assert calibration.status["varying"].usable
