"""Pictures of a tuned comparison."""

from __future__ import annotations

from pathlib import Path

from evatune.finetune.comparison.tuned_conditions import KnownRecipe
from evatune.finetune.comparison.tuned_summary import summarize
from evatune.report.plots import save_figure
from evatune.report.tuned_plots import line_styles, ranks_plot, rates_plot
from tests.tuned_lines import METHODS, line_of, tuned_lines


def test_a_method_looks_the_same_beside_whatever_others() -> None:
    styles = line_styles(tuple(METHODS))
    assert len(set(styles.values())) == len(METHODS)
    for method in METHODS:
        assert line_styles([method]) == {method: styles[method]}
    variants = line_styles(["eva", "eva (rho 1)", "theirs"])
    assert variants["eva"].color == variants["eva (rho 1)"].color
    assert variants["eva"].dashes != variants["eva (rho 1)"].dashes


def test_a_picture_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    (group,) = summarize(tuned_lines(tasks=("digits",), methods=("eva",))).groups
    for kind in ("svg", "png"):
        for name in ("a", "b"):
            figure = ranks_plot(group, "eva")
            assert figure is not None
            save_figure(figure, tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    lora = summarize(tuned_lines(tasks=("digits",), methods=("lora",), test_seeds=0)).groups[0]
    assert ranks_plot(lora, "eva") is None


def test_a_legend_stays_inside_its_picture_whatever_methods_are_called() -> None:
    lines = tuned_lines(methods=[*METHODS][:9], tasks=("digits",))
    lines += tuned_lines(methods=["eva-paper-centered"], tasks=("digits",), budget="parameters")
    settings = {"adapter.rank": 2, "adapter.rho": 2, "adapter.budget": "ranks"}
    source = {("images", "digits"): KnownRecipe("mine.yaml", settings)}
    (group,) = summarize(lines, source).groups
    assert "eva-paper-centered (budget parameters)" in group.methods
    figure = rates_plot(group, group.methods, "loss")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0


def test_a_rate_that_diverged_is_marked() -> None:
    lines = tuned_lines(tasks=("digits",), methods=("lora",), test_seeds=0)
    lines.append(line_of("images", "digits", "lora", 1.0, 0, False, diverged=True))
    (group,) = summarize(lines).groups
    (axes,) = rates_plot(group, group.methods, "loss").axes
    crosses = [line.get_xdata() for line in axes.lines if line.get_marker() == "x"]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert [list(place) for place in crosses] == [[1.0]]
    assert [list(place) for place in dots] == [[0.01]]
