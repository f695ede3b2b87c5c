"""Pictures of a tuned comparison, legible at the width of a phone: one panel below the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evatune.finetune.comparison.statistics import DomainComparison, DomainDifference
from evatune.finetune.comparison.tuned_cells import FULL, Cell, Group, RatePoint, base_name
from evatune.finetune.recipe import REFERENCE
from evatune.report.evidence import signed
from evatune.report.plots import STYLE
from evatune.report.summary import split_name
from evatune.report.text import NONE
from evatune.utils.extras import extras
from evatune.utils.markup import plot_text

with extras(__name__):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

_WIDTH = 4.2  # inches; 403 pixels of CSS, at which the text has its size
_LEGEND_COLUMNS = 3
_FOREGROUND = (REFERENCE, "eva", FULL)
_FAR = ("untouched", "head")  # from LoRA, on purpose: they do not stretch an axis
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_TICKS = (1, 1.5, 2, 3, 5, 7)  # of a decade
_RATE_TICKS, _FEW_RATE_TICKS = (1, 2, 5), (1, 3)
_WIDE = 500  # largest rate over smallest, above which there is room for few ticks
_TASK_MARKERS = "osDv^<>PXp*h"
# Of the figure of a method that lies beyond the axis, which hides its interval's line.
_BEYOND: dict[str, Any] = {
    "zorder": 2.2,  # above lines, below the frame
    "va": "center",
    "fontsize": 8,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
}
# Okabe and Ito's colors but for their yellow, which is too pale for a line, and grays.
_BLACK, _DARK, _LIGHT = "#000000", "#666666", "#a6a6a6"
_BLUE, _SKY, _ORANGE, _RED = "#0072b2", "#56b4e9", "#e69f00", "#d55e00"
_GREEN, _PINK, _WINE, _OLIVE = "#009e73", "#cc79a7", "#882255", "#8c8c2a"
_COLORS: dict[str, tuple[str, int]] = {  # color and dashes
    "untouched": (_LIGHT, 2),
    "head": (_LIGHT, 1),
    "full": (_DARK, 1),
    "lora": (_BLACK, 0),
    "eva": (_BLUE, 0),
    "eva-paper-centered": (_BLUE, 1),
    "eva-paper": (_SKY, 0),
    "eva-gradients": (_BLUE, 3),
    "eva-rho1": (_BLUE, 2),
    "eva-centered": (_OLIVE, 0),
    "lora-redist": (_SKY, 1),
    "eva-minor": (_SKY, 2),
    "eva-paper-random": (_ORANGE, 1),
    "eva-shuffled": (_SKY, 3),
    "lora-orthogonal": (_ORANGE, 0),
    "rslora": (_GREEN, 3),
    "lora-fa": (_ORANGE, 2),
    "eva-fa": (_ORANGE, 3),
    "lora-ga": (_RED, 0),
    "lora-one": (_RED, 1),
    "pissa": (_GREEN, 0),
    "milora": (_GREEN, 1),
    "olora": (_GREEN, 2),
    "dora": (_PINK, 0),
    "adalora": (_PINK, 1),
    "eva-dora": (_PINK, 2),
    "loraplus": (_WINE, 0),
    "corda": (_OLIVE, 1),
    "mica": (_OLIVE, 2),
}
_SPARE = [
    (color, dashes) for dashes in (1, 2, 3) for color in (_WINE, _OLIVE, _ORANGE, _RED, _DARK)
]


@dataclass(frozen=True)
class LineStyle:
    """The style in which a method is drawn, in every picture."""

    color: str
    dashes: Any
    width: float

    def line(self, **options: Any) -> dict[str, Any]:
        """Return it as matplotlib's arguments."""
        return {"color": self.color, "ls": self.dashes, "lw": self.width} | options


def line_styles(methods: Sequence[str]) -> dict[str, LineStyle]:
    """Return a style for each method.

    A method with other settings, such as "eva (rho 1)", has the color of the method. One that
    nobody foresaw gets what is left, so that it depends on the names of the others.
    """
    spare = iter(_SPARE * (1 + len(methods)))
    colors = dict(_COLORS)
    variants: dict[str, int] = {}
    styles = {}
    for method in methods:
        base = base_name(method)
        if base not in colors:
            colors[base] = next(spare)
        color, dashes = colors[base]
        dashes += variants.get(base, 0)
        variants[base] = variants.get(base, 0) + 1
        width = 2.0 if method in _FOREGROUND else 1.2
        styles[method] = LineStyle(color, _DASHES[dashes % len(_DASHES)], width)
    return styles


def forest_plot(compared: DomainComparison, title: str) -> Figure:
    """Draw the mean differences to LoRA with their 95 % intervals, best first, and each task's.

    Methods that are far from LoRA on purpose may lie beyond the axis; their figure says where.
    """
    lines = sorted(compared.methods, key=lambda line: line.mean)
    styles = line_styles([line.method for line in lines])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1.4 + 0.4 * len(lines)), layout="constrained")
        axes = figure.subplots()
        low, high = _forest_limits(compared)
        axes.set_xlim(low, high)
        axes.set_ylim(-0.6, len(lines) - 0.4)
        for height, line in enumerate(lines):
            _forest_row(axes, height, line, compared, styles[line.method])
        axes.axvline(0, color=_BLACK, lw=0.8)
        axes.set_yticks(range(len(lines)), [_row_label(line.method) for line in lines])
        axes.set_xlabel(f"score less {plot_text(compared.reference)}'s, points")
        axes.set_title(plot_text(title), loc="left", fontsize=9)
        _task_legend(figure, compared.tasks)
    return figure


def _forest_row(
    axes: Axes, height: int, line: DomainDifference, compared: DomainComparison, style: LineStyle
) -> None:
    for test, width in ((line.random_tasks, 1.0), (line.fixed_tasks, 3.2)):
        if test is not None:
            ends = [100 * test.interval.low, 100 * test.interval.high]
            axes.plot(ends, [height, height], color=style.color, lw=width, solid_capstyle="butt")
    mean, (low, high) = 100 * line.mean, axes.get_xlim()
    if mean < low:
        axes.text(low, height, f" ← {signed(line.mean)}", ha="left", **_BEYOND)
    elif mean > high:
        axes.text(high, height, f"{signed(line.mean)} → ", ha="right", **_BEYOND)
    else:
        axes.plot(mean, height, "D", color=style.color, ms=5.5, zorder=3)
    for of_task in compared.paired:
        if of_task.method == line.method:
            marker = _TASK_MARKERS[compared.tasks.index(of_task.task) % len(_TASK_MARKERS)]
            axes.plot(
                100 * of_task.mean, height - 0.28, marker, color=style.color, ms=3.2, alpha=0.75
            )


def _forest_limits(compared: DomainComparison) -> tuple[float, float]:
    near = {line.method for line in compared.methods} - set(_FAR) - {FULL}
    near = near or {line.method for line in compared.methods}
    values = [0.0]
    for line in compared.methods:
        if line.method in near:
            values.append(100 * line.mean)
            if line.fixed_tasks:
                interval = line.fixed_tasks.interval
                values += [100 * interval.low, 100 * interval.high]
    values += [100 * of_task.mean for of_task in compared.paired if of_task.method in near]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


def _row_label(method: str) -> str:
    """Return a method's name, with the settings that make it a method of its own below it."""
    return plot_text(method).replace(" (", "\n(")


def _task_legend(figure: Figure, tasks: Sequence[str]) -> None:
    handles = [
        Line2D([], [], ls="", marker=_TASK_MARKERS[i % len(_TASK_MARKERS)], color=_DARK, ms=4)
        for i in range(len(tasks))
    ]
    names = [plot_text(task) for task in tasks]
    figure.legend(
        handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8,
        columnspacing=1, handletextpad=0.3,
    )  # fmt: skip


def curves_plot(group: Group, methods: Sequence[str]) -> Figure:
    """Draw the mean validation loss over the steps at tuned rates, a panel per task.

    Args:
        methods: all of the summary, which decide the styles.
    """

    def panel(axes: Axes, task: str, styles: dict[str, LineStyle]) -> None:
        near: list[tuple[float, float]] = []  # smallest loss and second one of each curve
        far: list[tuple[float, float]] = []
        for method in group.methods:
            cell = group.cell(task, method)
            points = cell.curve if cell else []
            if points:
                steps, losses, _ = zip(*points, strict=True)
                axes.plot(steps, losses, **styles[method].line(zorder=2 + (method in _FOREGROUND)))
                extent = min(losses), losses[min(1, len(losses) - 1)]
                (far if method in _FAR else near).append(extent)
        ends, starts = zip(*(near or far), strict=True) if near or far else ((), ())
        if ends and 0 < min(ends) < max(starts):
            low, high = min(ends), float(np.quantile(starts, 0.75))
            axes.set_yscale("log")  # late in a run the methods are close
            axes.set_ylim(low * (low / high) ** 0.05, high * (high / low) ** 0.05)
            axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%.3g"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("validation loss")

    return _panels(group, methods, panel, "step")


def rates_plot(group: Group, methods: Sequence[str], measure: str) -> Figure:
    """Draw the validation loss or score against the learning rate, the chosen rate as a dot.

    Args:
        methods: all of the summary, which decide the styles. measure: "loss" or "score".
    """

    def value(point: RatePoint) -> float:
        return point.loss if measure == "loss" else point.score

    def panel(axes: Axes, task: str, styles: dict[str, LineStyle]) -> None:
        seen: list[float] = []
        best: list[float] = []
        for method in group.methods:
            cell = group.cell(task, method)
            if cell is None or not cell.rates:
                continue
            rates = [point.rate for point in cell.rates]
            values = [
                value(point) if math.isfinite(point.loss) else math.nan for point in cell.rates
            ]
            style = styles[method]
            axes.plot(rates, values, **style.line(zorder=2 + (method in _FOREGROUND)))
            chosen = [(r, v) for r, v in zip(rates, values, strict=True) if r == cell.rate]
            for rate, chosen_value in chosen:
                axes.plot(rate, chosen_value, "o", color=style.color, ms=4.5, zorder=4)
                if method not in _FAR:
                    best.append(chosen_value)
            for rate, rate_value in zip(rates, values, strict=True):
                if math.isnan(rate_value):
                    top = 0.97 if measure == "loss" else 0.03
                    axes.plot(
                        rate,
                        top,
                        "x",
                        color=style.color,
                        ms=5,
                        transform=axes.get_xaxis_transform(),
                    )
            if method not in _FAR:
                seen += filter(math.isfinite, values)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = _FEW_RATE_TICKS if high > _WIDE * low else _RATE_TICKS
        axes.xaxis.set_major_locator(LogLocator(subs=ticks))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylabel(f"validation {measure}")
        _zoom(axes, seen, best, measure)

    return _panels(group, methods, panel, "learning rate (dot: chosen, ×: diverged)")


def _zoom(axes: Axes, seen: Sequence[float], best: Sequence[float], measure: str) -> None:
    """Show what is near the best rates; points far worse lie outside."""
    if not best or not seen:
        return
    sign = 1 if measure == "loss" else -1
    values = sorted(sign * value for value in seen)
    good, worst = values[0], float(np.quantile(values, 0.8))
    worst = max(worst, *(sign * value for value in best))
    margin = 0.07 * (worst - good) or 0.01
    axes.set_ylim(*sorted((sign * (good - margin), sign * (worst + margin))))


def ranks_plot(group: Group, method: str) -> Figure | None:
    """Draw a method's rank of every layer, a panel per task; None where it has one rank for all."""
    cells = [cell for cell in group.of(method) if cell.ranks]
    if not cells:
        return None
    heights = [len({split_name(name)[1] for name in cell.ranks or {}}) for cell in cells]
    with matplotlib.rc_context(STYLE):
        size = (_WIDTH, sum(0.8 + 0.24 * height for height in heights))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(
            len(cells), 1, squeeze=False, height_ratios=[height + 2 for height in heights]
        )[:, 0]
        for axes, cell in zip(panels, cells, strict=True):
            _rank_panel(axes, cell)
        panels[-1].set_xlabel("block")
    return figure


def _rank_panel(axes: Axes, cell: Cell) -> None:
    ranks = cell.ranks or {}
    split = {name: split_name(name) for name in ranks}
    blocks = list(dict.fromkeys(block for block, _ in split.values()))
    types = list(dict.fromkeys(kind for _, kind in split.values()))
    table = np.full((len(types), len(blocks)), math.nan)
    for name, (block, kind) in split.items():
        table[types.index(kind), blocks.index(block)] = ranks[name]
    top = max(1, *ranks.values())
    axes.imshow(table, cmap="viridis", aspect="auto", vmin=0, vmax=top)
    for name, (block, kind) in split.items():
        shade = "black" if ranks[name] > 0.6 * top else "white"
        axes.text(
            blocks.index(block), types.index(kind), str(ranks[name]),
            ha="center", va="center", color=shade, fontsize=7,
        )  # fmt: skip
    axes.set_xticks(range(len(blocks)), [plot_text(block or NONE) for block in blocks], fontsize=8)
    axes.set_yticks(range(len(types)), [plot_text(kind) for kind in types], fontsize=8)
    axes.set_title(plot_text(cell.task), loc="left", fontsize=9)


def _panels(
    group: Group,
    methods: Sequence[str],
    panel: Callable[[Axes, str, dict[str, LineStyle]], None],
    label: str,
) -> Figure:
    styles = line_styles(methods)
    names = [_row_label(method) for method in group.methods]
    rows = math.ceil(len(names) / _LEGEND_COLUMNS) + sum("\n" in name for name in names)
    with matplotlib.rc_context(STYLE):
        size = (_WIDTH, 0.5 + 0.17 * rows + 2.4 * len(group.tasks))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(group.tasks), 1, squeeze=False)[:, 0]
        for axes, task in zip(panels, group.tasks, strict=True):
            panel(axes, task, styles)
            axes.set_title(plot_text(task), loc="left", fontsize=9)
        panels[-1].set_xlabel(label)
        handles = [Line2D([], [], **styles[method].line()) for method in group.methods]
        figure.legend(
            handles, names, loc="outside lower left", ncols=_LEGEND_COLUMNS,
            frameon=False, fontsize=8, columnspacing=1, handlelength=1.8,
        )  # fmt: skip
    return figure
