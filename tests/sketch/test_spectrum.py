"""A spectrum: the angles between two, and what none can say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import evatune
from evatune import CalibrationConfig
from evatune.sketch import SKETCHES
from evatune.sketch.spectrum import InputMoments, empty
from tests.helpers import Toy, inputs
from tests.sketches import build, feed, planted, principal_angles


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


def test_a_large_mean_excuses_no_energy_of_gradients_above_their_total() -> None:
    inputs_of_gradients = InputMoments(torch.full((1,), 1e6), 1e6)
    gradients = replace(
        empty(4),
        directions=torch.eye(4)[:1],
        energies=torch.ones(1),
        total_energy=1.0,
        rows=8,
        mean=torch.eye(4)[0] * 1e3,
        inputs=inputs_of_gradients,
    )
    assert list(gradients.contradictions(1)) == []
    assert list(replace(gradients, total_energy=0.9).contradictions(1)) == [
        "energies are more than the total energy"
    ]


@pytest.mark.parametrize("center", [False, True])
def test_the_participation_ratio_counts_the_directions_that_hold_the_energy(center: bool) -> None:
    rows = planted(600, 32, decay=0.6, mean=0.2).double()
    centered = rows - rows.mean(0) if center else rows
    moment = centered.T @ centered / len(rows)
    exact = float(moment.trace() ** 2 / moment.square().sum())
    spectrum = feed(build("exact", 32, 32, center=center), rows.float(), 600)
    assert spectrum.participation_ratio == pytest.approx(exact, rel=1e-4)
    # with a tail that holds little the bound is close
    leading = feed(build("exact", 32, 8, center=center), rows.float(), 600)
    assert exact * 0.9999 < leading.participation_ratio < 1.001 * exact


def test_an_even_spectrum_has_as_many_directions_as_it_is_wide_of_which_few_are_known() -> None:
    rows = 3 * torch.eye(16).repeat(4, 1)
    assert feed(build("exact", 16, 4), rows, 64).participation_ratio == pytest.approx(16)
    one = torch.eye(16)[:1].repeat(40, 1)
    assert feed(build("exact", 16, 4), one, 40).participation_ratio == pytest.approx(1)
    assert empty(16).participation_ratio == 0
