"""The stop rule."""

from __future__ import annotations

from typing import Any

import torch

import evatune
from evatune import CalibrationConfig, Status
from tests.helpers import Toy, inputs


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
