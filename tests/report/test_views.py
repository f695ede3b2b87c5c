"""Summaries and tables of a calibration, a plan and a spectrum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import evatune
from evatune.calibration.data import CalibratedLayer
from evatune.calibration.status import Status
from evatune.layers import LayerSpec
from evatune.report.text import percent
from evatune.report.views import html, view_of
from evatune.sketch.spectrum import empty
from evatune.utils.markup import printable
from tests.helpers import NAMES


def test_a_calibration_is_told_in_its_layers_and_sentences(
    calibration: evatune.Calibration,
) -> None:
    text = calibration.summary()
    title, blank, headings, *_ = text.splitlines()
    assert title == repr(calibration).strip("<>")
    assert blank == ""
    assert headings.split() == ["layer", "rank", "PR", "explained", "captured", "status"]
    assert all(printable(name) in text for name in NAMES)
    assert f"{len(NAMES)} layers with " in text
    assert "\x1b" not in text


def test_layer_types_are_listed_where_layers_are_many(calibration: evatune.Calibration) -> None:
    (name, *_) = calibration.layers
    many = {f"layers.{block}.up": name for block in range(20)}
    parts = {
        key: {new: getattr(calibration, key)[old] for new, old in many.items()}
        for key in ("spectra", "status")
    }
    layer = calibration.layers[name]
    layers = {new: replace(layer, spec=replace(layer.spec, name=new)) for new in many}
    calibration = replace(calibration, **parts, layers=layers)
    assert [row[:2] for row in view_of(calibration).cells] == [["up", "20"]]
    plan = calibration.allocate()
    assert [row[:2] for row in view_of(plan).cells] == [("up", "20")]
    assert len(calibration.summary()) < 2000


def test_a_table_has_a_row_per_layer(calibration: evatune.Calibration) -> None:
    plan, table = calibration.allocate(), calibration.to_pandas()
    assert table["rank"].tolist() == list(plan.ranks.values())
    assert table.index[0] == next(iter(calibration.layers))
    assert table["status"].tolist() == list(map(str, calibration.status.values()))
    assert "advice" not in table
    changes = plan.to_pandas()["against_uniform"].tolist()
    assert changes == [rank - plan.rank for rank in plan.ranks.values()]


def test_a_spectrum_is_told_by_powers_of_two(calibration: evatune.Calibration) -> None:
    spectrum = next(iter(calibration.spectra.values()))
    shares = spectrum.explained_variance_ratio
    cells = view_of(spectrum).cells
    assert [row[0] for row in cells] == ["1", "2", "4"]
    assert cells[-1][1] == percent(float(shares.sum()))
    assert spectrum.certificate is not None
    assert cells[0][2] == percent(spectrum.certificate.captured(1))
    table = spectrum.to_pandas()
    assert list(table.index) == [1, 2, 3, 4]
    assert table["cumulative"].iloc[-1] == pytest.approx(float(shares.sum()), rel=1e-6)
    assert table["captured"].sum() == pytest.approx(spectrum.certificate.captured(), rel=1e-6)


def test_what_saw_nothing_is_shown_as_well() -> None:
    nothing = empty(8)
    layer = CalibratedLayer(LayerSpec("a", 8, 4), input=None)
    calibration = evatune.Calibration(
        spectra={"a": nothing},
        status={"a": Status.NEVER_CALLED},
        layers={"a": layer},
        config=evatune.CalibrationConfig(rank=2),
        batches=1,
    )
    assert "No ranks can be given: the budget of 2 ranks" in calibration.summary()
    assert "never_called: a. " in calibration.summary()
    assert math.isnan(calibration.to_pandas()["captured"].astype(float)["a"])
    assert "Spectrum of 0 rows" in nothing.summary()
    assert nothing.to_pandas().empty
    for value in (calibration, nothing):
        assert value.plot().figure is not None


def test_html_holds_no_markup_of_others_and_no_formula(calibration: evatune.Calibration) -> None:
    for value in (calibration, calibration.allocate(), next(iter(calibration.spectra.values()))):
        text = html(value)
        assert text == value._repr_html_()
        assert len(text) < 20_000
        assert "<script" not in text
        assert "\x1b" not in text
        assert "$" not in text
        assert text.count("<table>") == text.count("</table>") == 1
