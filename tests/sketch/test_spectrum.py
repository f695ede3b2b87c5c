"""A spectrum: the angles between two, and what none can say."""

from __future__ import annotations

import pytest
import torch

import evatune
from evatune import CalibrationConfig
from evatune.sketch import SKETCHES
from evatune.sketch.spectrum import principal_angles
from tests.helpers import Toy, inputs


def test_principal_angles_resolve_what_a_cosine_in_float32_cannot() -> None:
    angle = torch.tensor(1e-6, dtype=torch.float64)
    a = torch.tensor([[1.0, 0.0, 0.0]])
    b = torch.stack([angle.cos(), angle.sin(), torch.tensor(0.0)]).double()[None]
    assert principal_angles(a, b).item() == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("center", [False, True])
def test_steep_spectra_beside_a_large_mean_contradict_nothing(sketch: str, center: bool) -> None:
    batches = [x * 0.1 ** torch.arange(16) + torch.eye(16)[0] * 1e4 for x in inputs(8)]
    found = evatune.calibrate(
        Toy(), batches, CalibrationConfig(rank=4, sketch=sketch, center=center, tolerance=0)
    )
    for name, spectrum in found.spectra.items():
        assert list(spectrum.contradictions(found.config.n_components)) == [], name
