"""Curves and tables of fine-tuning runs, from what they wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from evatune.tasks.compare import Line

_STYLE = {"font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def run_plot(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training and evaluation loss, and the score, over steps; a PNG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
            points = [(line["step"], line[key]) for line in metrics if key in line]
            if points:
                left.plot(*zip(*points, strict=True), marker="o", ms=3, label=label)
        points = [(line["step"], line["eval_score"]) for line in metrics if "eval_score" in line]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", ms=3, color="C2")
        left.set(xlabel="step", ylabel="loss")
        right.set(xlabel="step", ylabel="score on unseen examples")
        left.legend(frameon=False)
        _save(figure, path)


def comparison_plot(lines: Sequence[Line], path: Path) -> None:
    """Evaluation loss and score over steps, one curve per method at its best learning rate; a PNG."""
    shown = [line for line in lines if line.best]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, 2)
        colors = matplotlib.colormaps["tab20" if len(shown) > 10 else "tab10"]
        for number, line in enumerate(shown):
            for part, axis in enumerate(axes, start=1):
                steps, values = [p[0] for p in line.curve], [p[part] for p in line.curve]
                label = f"{line.method} (lr {line.learning_rate:g})"
                axis.plot(steps, values, marker="o", ms=3, color=colors(number), label=label)
        axes[0].set(xlabel="step", ylabel="evaluation loss, mean over seeds")
        axes[1].set(xlabel="step", ylabel="score, mean over seeds")
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right center", fontsize=8)
        _save(figure, path)


def comparison_table(lines: Sequence[Line], target_loss: float | None) -> Table:
    """One line per method and learning rate; a method's best rate is marked."""
    table = Table(title="Comparison", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for heading in (
        "method",
        "learning rate",
        "seeds",
        "score",
        "loss",
        "steps to target",
        "parameters",
        "init s",
        "train s",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for line in sorted(lines, key=lambda line: -line.score):
        deviation = "" if line.score_deviation is None else f" ± {line.score_deviation:.3f}"
        steps = "–" if line.steps_to_target is None else f"{line.steps_to_target:.0f}"
        table.add_row(
            line.method, f"{line.learning_rate:g}{' *' if line.best else '  '}", str(line.seeds),
            f"{line.score:.3f}{deviation}", f"{line.eval_loss:.3f}", steps, f"{line.trainable_parameters:,}",
            f"{line.init_seconds:.1f}", f"{line.train_seconds:.1f}",
            style="" if line.best else "dim",
        )  # fmt: skip
    target = "" if target_loss is None else f" Target: evaluation loss {target_loss:.3f}."
    table.caption = f"* the method's best rate, chosen on these very scores. ± is the deviation over seeds.{target}"
    return table


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
