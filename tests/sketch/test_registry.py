"""The registry of sketches: a toy one through it, and kinds that nobody has."""

from __future__ import annotations

from typing import Self

import pytest
import torch
from torch import Tensor

import evatune
from evatune import CalibrationConfig
from evatune.calibration import config
from evatune.errors import ConfigError
from evatune.sketch import (
    SKETCHES,
    TOKEN_COUNTS,
    SketchUpdate,
    is_additive,
    make_sketch,
)
from evatune.sketch.base import InputSketch, SketchSettings
from evatune.sketch.spectrum import Spectrum
from tests.helpers import Toy, inputs
from tests.sketches import build, planted


class AxisSketch(InputSketch):
    """Keeps the energy of each coordinate, and gives the strongest axes as directions."""

    _STATE = (*InputSketch._STATE, "squares")

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        self.squares = torch.zeros(self.width, dtype=self.dtype)

    def summarize(self, x: Tensor, index: Tensor | None = None) -> SketchUpdate:
        rows = (x if index is None else x[index]).to(self.dtype)
        self.shift = torch.zeros(self.width)
        squares = rows.square().sum(0)
        return SketchUpdate(len(rows), rows.sum(0), squares.sum(), squares, self._fresh)

    def spectrum(self) -> Spectrum:
        energies, axes = self.squares.sort(descending=True, stable=True)
        return self._answer(torch.eye(self.width)[axes], energies)

    def _add_moment(self, moment: Tensor) -> None:
        self.squares += moment

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        self.squares += other.squares


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a sketch that one line in the registry and one among the choices add."""
    monkeypatch.setitem(SKETCHES, "axes", AxisSketch)
    monkeypatch.setattr(config, "SKETCH_NAMES", (*config.SKETCH_NAMES, "axes"))
    return "axes"


def test_a_registered_sketch_is_used_by_calibrate(axes: str) -> None:
    settings = CalibrationConfig(rank=4, sketch=axes, tolerance=0)
    calibration = evatune.calibrate(Toy(), inputs(), settings)
    exact = evatune.calibrate(
        Toy(), inputs(), CalibrationConfig(rank=4, sketch="exact", tolerance=0)
    )
    for name, spectrum in calibration.spectra.items():
        assert torch.equal(spectrum.directions.abs().amax(1), torch.ones(8))
        assert spectrum.total_energy == pytest.approx(exact.spectra[name].total_energy, rel=1e-5)
        assert spectrum.energies.sum() < exact.spectra[name].energies.sum()


def test_a_registered_sketch_goes_through_files_and_merges(axes: str) -> None:
    rows = planted(200, 16)
    whole, half = build(axes, 16, 4), build(axes, 16, 4)
    whole.update(rows)
    half.update(rows[:120])
    again = build(axes, 16, 4)
    again.set_state(half.state())
    other = build(axes, 16, 4)
    other.update(rows[120:])
    again.merge(other)
    assert torch.allclose(again.spectrum().energies, whole.spectrum().energies)
    assert not is_additive(axes)


def test_an_unknown_sketch_is_refused_with_the_known_ones() -> None:
    known = "nystrom, exact, incremental"
    with pytest.raises(ValueError, match=f"no sketch named 'best'; known are {known}"):
        build("best", 16, 4)
    with pytest.raises(ConfigError, match=f"sketch is 'best'; choose one of {known}"):
        CalibrationConfig(sketch="best")


def test_token_counts_are_made_by_name_and_not_to_be_chosen() -> None:
    sketch = make_sketch(TOKEN_COUNTS, SketchSettings(8, 2))
    sketch.update(torch.tensor([3, 3, 1]))
    assert sketch.spectrum().energies.tolist() == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(ConfigError, match="sketch is 'counts'"):
        CalibrationConfig(sketch="counts")
