"""Tables of fine-tuning runs, for the terminal and as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evatune.report.markdown import markdown_table
from evatune.report.tables import fitted_table
from evatune.report.text import NONE
from evatune.utils.extras import extras
from evatune.utils.markup import markdown_code, markdown_text

with extras(__name__):
    from rich.console import Console
    from rich.table import Table

if TYPE_CHECKING:
    from evatune.finetune.comparison.summary import Comparison, MeanStd, MethodSummary


_HEADINGS = (
    "task",
    "method",
    "score",
    "loss",
    "learning rate",
    "seeds",
    "steps to target",
    "parameters",
    "grad B",
    "init s",
    "train s",
)
# What a narrow terminal does without, the first first.
_DROPPABLE = (
    *("grad B", "init s", "parameters", "steps to target", "train s"),
    *("seeds", "loss", "learning rate"),
)


def comparison_table(terminal: Console, comparison: Comparison) -> Table:
    """Return a table with a line per task, method and learning rate, the best rate marked.

    Several tasks end with averages.
    """
    lines: list[list[str]] = []
    styles: list[str] = []
    sections = []
    for task in comparison.targets:
        lines += _rows(comparison, task)
        styles += ["" if line.best else "dim" for line in _members(comparison, task)]
        sections.append(len(lines) - 1)
    averages = _averages(comparison)
    return fitted_table(
        terminal,
        "Comparison",
        _HEADINGS,
        [*lines, *averages],
        styles=[*styles, *("" for _ in averages)],
        droppable=_DROPPABLE,
        sections=sections,
        notes=["comparison.md has them.", *_caption(comparison)],
    )


def comparison_markdown(comparison: Comparison, command: str) -> str:
    """Return the same table as Markdown, under the command that made it."""
    rows = [row for task in comparison.targets for row in _rows(comparison, task)]
    table = markdown_table(_HEADINGS, [*rows, *_averages(comparison)], words=2)
    caption = map(markdown_text, _caption(comparison))
    return "\n".join([markdown_code(command), "", *table, "", *caption]) + "\n"


def _rows(comparison: Comparison, task: str) -> list[list[str]]:
    """Return the cells of a task's lines; the best of several rates is marked."""
    marked = _has_rates(comparison)
    return [_cells(line, line.best and marked) for line in _members(comparison, task)]


def _members(comparison: Comparison, task: str) -> list[MethodSummary]:
    """Return the lines of a task, the best score first."""
    return sorted((line for line in comparison.lines if line.task == task), key=_worst_last)


def _averages(comparison: Comparison) -> list[list[str]]:
    """Return a row per method with its mean over several tasks, the best first."""
    if len(comparison.targets) < 2:
        return []
    empty = [""] * (len(_HEADINGS) - 5)
    best = "best" if _has_rates(comparison) else ""
    return [
        [f"all {len(comparison.targets)}", method, f"{score:.3f}", "", best, *empty]
        for method, score in sorted(comparison.averages().items(), key=lambda item: -item[1])
    ]


def _caption(comparison: Comparison) -> list[str]:
    goals = ", ".join(f"{task} {loss:.3f}" for task, loss in comparison.targets.items())
    chosen = "* the method's best rate: the smallest mean loss on validation examples. "
    return [
        f"{chosen if _has_rates(comparison) else ''}± is the standard deviation over seeds.",
        f"Target, an evaluation loss: {goals}. grad B: norm of the gradient of all B at step 1.",
    ]


def _has_rates(comparison: Comparison) -> bool:
    """Return whether a method was run at several rates, so that one of them is its best."""
    methods = {(line.task, line.method) for line in comparison.lines}
    return len(methods) < len(comparison.lines)


def _worst_last(line: MethodSummary) -> float:
    return math.inf if math.isnan(line.score.mean) else -line.score.mean


def _cells(line: MethodSummary, chosen: bool) -> list[str]:
    return [
        line.task,
        line.method,
        _mean_std(line.score, ".3f"),
        _mean_std(line.eval_loss, ".3f"),
        f"{line.learning_rate:g}{' *' if chosen else '  '}",
        str(line.seeds),
        NONE if line.steps_to_target is None else _mean_std(line.steps_to_target, ".0f"),
        _mean_std(line.trainable_parameters, ",.0f"),
        NONE if line.first_gradient_b is None else _mean_std(line.first_gradient_b, ".3g"),
        _mean_std(line.init_seconds, ".1f"),
        _mean_std(line.train_seconds, ".1f"),
    ]


def _mean_std(value: MeanStd, form: str) -> str:
    return f"{value.mean:{form}}" + (
        "" if value.deviation is None else f" ± {value.deviation:{form}}"
    )
