"""Tables of fine-tuning runs, for the terminal and as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evatune.report.tables import plain
from evatune.utils.extras import extras
from evatune.utils.markup import markdown_code, markdown_text

with extras(__name__):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

if TYPE_CHECKING:
    from evatune.finetune.summary import Comparison, MeanStd, MethodSummary


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
