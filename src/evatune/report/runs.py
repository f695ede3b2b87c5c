"""Curves and tables of fine-tuning runs, from what they wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatune.calibration.result import Calibration
from evatune.ranks.allocation import RankPlan
from evatune.report.plots import STYLE, save_figure
from evatune.report.summary import layer_rows
from evatune.report.tables import plain
from evatune.utils.extras import extras
from evatune.utils.markup import markdown_code, markdown_text, plot_text

with extras(__name__):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

if TYPE_CHECKING:
    from evatune.finetune.summary import Comparison, MeanStd, MethodSummary


def run_plot(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training and evaluation loss, and the score, over steps; a PNG."""
    with matplotlib.rc_context(STYLE):
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
        save_figure(figure, path)


def rank_plot(calibration: Calibration, plan: RankPlan, path: Path) -> None:
    """Draw the rank of every layer, blocks across and layer types down; a PNG."""
    rows = layer_rows(calibration, plan)
    blocks, types = (
        list(dict.fromkeys(getattr(row, part) for row in rows)) for part in ("block", "type")
    )
    table = [[math.nan] * len(blocks) for _ in types]
    for row in rows:
        table[types.index(row.type)][blocks.index(row.block)] = row.rank
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(2.5 + 0.45 * len(blocks), 1 + 0.32 * len(types)), layout="constrained"
        )
        axes = figure.subplots()
        image = axes.imshow(table, cmap="viridis", aspect="auto", vmin=0)
        for row in rows:
            place = blocks.index(row.block), types.index(row.type)
            shade = "black" if row.rank > 0.6 * max(1, *plan.ranks.values()) else "white"
            axes.text(*place, str(row.rank), ha="center", va="center", color=shade, fontsize=8)
        axes.set_xticks(range(len(blocks)), map(plot_text, blocks))
        axes.set_yticks(range(len(types)), map(plot_text, types))
        axes.set_xlabel("block")
        figure.colorbar(image, ax=axes, label="rank")
        save_figure(figure, path)


def comparison_plot(comparison: Comparison, path: Path) -> None:
    """Draw loss and score over steps: a row per task, a curve per method at its best rate; a PNG.

    A score that is measured after training only is a point at the end.
    """
    shown = [line for line in comparison.lines if line.best]
    methods, tasks = (
        list(dict.fromkeys(getattr(line, part) for line in shown)) for part in ("method", "task")
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.6 + 2.8 * len(tasks)), layout="constrained")
        axes = figure.subplots(len(tasks), 2, squeeze=False)
        colors = matplotlib.colormaps["tab20" if len(methods) > 10 else "tab10"]
        for line in shown:
            for part, axis in enumerate(axes[tasks.index(line.task)], start=1):
                points = [
                    (point[0], point[part]) for point in line.curve if point[part] is not None
                ]
                axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    ms=3,
                    color=colors(methods.index(line.method)),
                )
        for task, (left, right) in zip(tasks, axes, strict=True):
            left.set(ylabel=plot_text(f"{task}: evaluation loss"))
            right.set(ylabel=plot_text(f"{task}: score"))
        for axis in axes[-1]:
            axis.set(xlabel="step (mean over seeds)")
        handles = [Line2D([], [], marker="o", ms=3, color=colors(i)) for i in range(len(methods))]
        figure.legend(handles, methods, frameon=False, loc="outside right upper", fontsize=8)
        save_figure(figure, path)


_HEADINGS = (
    "task",
    "method",
    "learning rate",
    "seeds",
    "score",
    "loss",
    "steps to target",
    "parameters",
    "grad B",
    "init s",
    "train s",
)


def comparison_table(comparison: Comparison) -> Table:
    """Return a table with a line per task, method and learning rate, the best rate marked.

    Several tasks end with averages.
    """
    table = Table(
        title="Comparison",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption_justify="left",
    )
    for heading in _HEADINGS:
        table.add_column(
            heading, justify="left" if heading in ("task", "method") else "right", no_wrap=True
        )
    tasks = list(comparison.targets)
    for task in tasks:
        members = sorted((line for line in comparison.lines if line.task == task), key=_worst_last)
        for line in members:
            table.add_row(
                *map(plain, _cells(line)),
                style="" if line.best else "dim",
                end_section=line is members[-1],
            )
    if len(tasks) > 1:
        for method, score in sorted(comparison.averages().items(), key=lambda item: -item[1]):
            table.add_row(f"all {len(tasks)}", method, "best", "", f"{score:.3f}")
    table.caption = Text("\n").join(map(plain, _caption(comparison)))
    return table


def comparison_markdown(comparison: Comparison, command: str) -> str:
    """Return the same table as Markdown, under the command that made it."""
    lines = [
        markdown_code(command),
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|---|---" + "|---:" * (len(_HEADINGS) - 2) + "|",
    ]
    for task in comparison.targets:
        members = sorted((line for line in comparison.lines if line.task == task), key=_worst_last)
        lines += ["| " + " | ".join(map(markdown_text, _cells(line))) + " |" for line in members]
    if len(comparison.targets) > 1:
        empty = " |" * (len(_HEADINGS) - 5)
        for method, score in sorted(comparison.averages().items(), key=lambda item: -item[1]):
            lines.append(
                f"| all {len(comparison.targets)} | {method} | best |  | {score:.3f} |{empty}"
            )
    return "\n".join([*lines, "", *map(markdown_text, _caption(comparison))]) + "\n"


def _caption(comparison: Comparison) -> list[str]:
    goals = ", ".join(f"{task} {loss:.3f}" for task, loss in comparison.targets.items())
    return [
        (
            "* the method's best rate, chosen on these very scores. ± is the standard deviation"
            " over seeds."
        ),
        f"Target, an evaluation loss: {goals}. grad B: norm of the gradient of all B at step 1.",
    ]


def _worst_last(line: MethodSummary) -> float:
    return math.inf if math.isnan(line.score.mean) else -line.score.mean


def _cells(line: MethodSummary) -> list[str]:
    return [
        line.task,
        line.method,
        f"{line.learning_rate:g}{' *' if line.best else '  '}",
        str(line.seeds),
        _spread(line.score, ".3f"),
        _spread(line.eval_loss, ".3f"),
        "–" if line.steps_to_target is None else _spread(line.steps_to_target, ".0f"),
        _spread(line.trainable_parameters, ",.0f"),
        "–" if line.first_gradient_b is None else _spread(line.first_gradient_b, ".3g"),
        _spread(line.init_seconds, ".1f"),
        _spread(line.train_seconds, ".1f"),
    ]


def _spread(value: MeanStd, form: str) -> str:
    return f"{value.mean:{form}}" + (
        "" if value.deviation is None else f" ± {value.deviation:{form}}"
    )
