"""Plots and the page show names as they are."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

from evatune.report.page import render

import evatune
from evatune.report import plots
from evatune.report.runs import rank_plot
from evatune.utils.markup import plot_text, printable
from tests.helpers import NAMES


def test_plots_and_page_show_every_name_as_it_is(
    calibration: evatune.Calibration, tmp_path: Path
) -> None:
    plan = calibration.allocate()
    page = render(calibration, plan, {"model": "<i>&\udce9"})
    page.encode("utf-8")
    assert "<i>" not in page
    assert "<script>" not in page
    assert "layers.a[/b]" in page
    assert "\x1b" not in page
    drawing = xml.etree.ElementTree.fromstring(plots.spectra(calibration, plan))
    words = {
        "".join(element.itertext()).strip()
        for element in drawing.iter()
        if element.tag.endswith("text")
    }
    assert {f"layers.{printable(name)}" for name in NAMES} <= words
    rank_plot(calibration, plan, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_a_legend_leaves_no_name_out() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    for name in NAMES:
        axes.plot([0, 1], label=plot_text(name))
    assert len(axes.get_legend_handles_labels()[1]) == len(NAMES)
