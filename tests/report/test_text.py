"""Figures and sentences for people."""

from __future__ import annotations

from evatune.report.text import rate_text


def test_rates_are_shown_as_they_are_written() -> None:
    rates = [2e-4, 8.06e-6, 1e-3, 9.99e-5, 0.5]
    assert [rate_text(rate) for rate in rates] == ["2e-4", "8.1e-6", "1e-3", "1e-4", "5e-1"]
