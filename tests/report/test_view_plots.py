"""Plots of a calibration, a plan and a spectrum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import matplotlib
import pytest
from matplotlib.figure import Figure

import evatune


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    from matplotlib import pyplot

    with matplotlib.rc_context():
        matplotlib.use("Agg")
        yield
        pyplot.close("all")


def test_a_plan_is_a_map_of_its_ranks_with_ink_that_can_be_read(
    calibration: evatune.Calibration,
) -> None:
    names = [f"layers.{block}.{kind}" for block in range(3) for kind in ("up", "down")]
    ranks = dict(zip(names, [0, 4, 2, 2, 3, 1], strict=True))
    axes = replace(calibration.allocate(), ranks=ranks, rank=2).plot()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["up", "down"]
    ink = {text.get_text(): text.get_color() for text in axes.texts}
    assert sorted(ink) == ["0", "1", "2", "3", "4"]
    assert ink["0"] == ink["4"] == "#ffffff"
    assert ink["2"] == "#1b2733"


def test_a_calibration_has_a_line_and_a_dot_per_input(calibration: evatune.Calibration) -> None:
    axes = Figure().subplots()
    assert calibration.plot(axes) is axes
    inputs = {layer.input for layer in calibration.layers.values()}
    assert len(axes.lines) == 2 * len(inputs)
    (spectrum, *_) = calibration.spectra.values()
    drawn = axes.lines[0].get_ydata()
    assert drawn[0] == 0
    assert drawn[-1] == pytest.approx(float(spectrum.explained_variance_ratio.sum()), rel=1e-6)


def test_a_spectrum_shows_what_unseen_rows_have_too(calibration: evatune.Calibration) -> None:
    (spectrum, *_) = calibration.spectra.values()
    assert len(spectrum.plot().lines) == 2
    assert len(replace(spectrum, certificate=None).plot().lines) == 1
