"""NaN and Inf in what layers are given."""

from __future__ import annotations

import torch

from tests.helpers import every_outcome


def test_a_layer_with_bad_rows_does_not_spoil_the_others() -> None:
    calibration = every_outcome()
    assert calibration.spectra["fine"].rows == 240
    assert calibration.spectra["nan"].rows == 0
    assert torch.isfinite(calibration.spectra["fine"].energies).all()
