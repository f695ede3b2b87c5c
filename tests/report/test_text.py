"""Figures and sentences for people."""

from __future__ import annotations

import evatune
from evatune.report.summary import Figures, Spread
from evatune.report.text import in_words, rate_text, signed_percent, summary_lines


def test_rates_are_shown_as_they_are_written() -> None:
    rates = [2e-4, 8.06e-6, 1e-3, 9.99e-5, 0.5]
    assert [rate_text(rate) for rate in rates] == ["2e-4", "8.1e-6", "1e-3", "1e-4", "5e-1"]


def test_a_spread_without_width_is_one_figure() -> None:
    assert in_words(Spread(1.0, 0.9999, 1.0001)) == "1"
    assert in_words(Spread(1.0, 0.5, 2.0)) == "1 (median; 0.5 to 2)"


def test_a_difference_has_the_minus_sign_of_charts(calibration: evatune.Calibration) -> None:
    assert [signed_percent(share) for share in (-0.044, 0.044)] == ["−4.4%", "+4.4%"]
    assert "(-" not in " ".join(summary_lines(Figures.of(calibration), ["matched"]))
