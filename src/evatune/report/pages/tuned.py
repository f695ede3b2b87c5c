"""The page of a comparison at tuned learning rates: verdicts first, then curves and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import stdev

from evatune.finetune.comparison.tuned_cells import Cell, Group, TunedSummary
from evatune.finetune.recipe import REFERENCE
from evatune.report.advice import Advice, advice, repeat_command
from evatune.report.charts import Curve, Score, curves, scores
from evatune.report.evidence import Verdict
from evatune.report.pages.base import Chart, Page, Table, Tile, document, text_cell
from evatune.report.tuned import (
    CELL_HEADINGS,
    LEGEND,
    METHOD_HEADINGS,
    cell_rows,
    method_rows,
)
from evatune.report.tuned_markdown import protocol
from evatune.report.verdicts import verdicts

_FEW = 4  # verdicts in large type


def render(summary: TunedSummary, made_by: str) -> str:
    """Return the page of a tuned comparison as one HTML document.

    Plots and verdicts are of the recipes' own settings; without those, of the first others.

    Args:
        made_by: the command.
    """
    condition = min((group.condition for group in summary.groups), default="")
    groups = [group for group in summary.groups if group.condition == condition]
    answers = verdicts(groups)
    advised = [each for group in groups for each in advice(group)]
    page = Page(
        title=f"{len(summary.methods)} methods at tuned learning rates",
        facts=_facts(summary, condition),
        verdict=_verdict(answers),
        command=_command(groups, advised),
        tiles=[Tile(answer.outcome, answer.claim) for answer in answers[:_FEW]],
        charts=_charts(groups, summary.methods),
        tables=_tables(summary, answers, advised),
        notes=[*_paragraphs(summary), LEGEND],
        settings={"made by": made_by},
    )
    return document(page)


def _facts(summary: TunedSummary, condition: str) -> dict[str, str]:
    tasks = {f"{group.domain} / {task}" for group in summary.groups for task in group.tasks}
    of_tests = sorted({seed for group in summary.groups for seed in group.test_seeds})
    shown = sorted(tasks)[:6]
    facts = {
        "tasks": ", ".join(shown) + (f" and {len(tasks) - 6} more" if len(tasks) > 6 else ""),
        "methods": ", ".join(summary.methods),
        "settings": condition,
        "runs": f"{summary.runs:,}",
        "test seeds": ", ".join(map(str, of_tests)) or "none yet",
    }
    return {name: value for name, value in facts.items() if value}


def _verdict(answers: Sequence[Verdict]) -> str:
    """Return the answer to whether the score is higher, which is what a reader came for."""
    higher = next(answer for answer in answers if answer.claim.startswith("Higher"))
    return f"{higher.outcome.capitalize()}: {higher.text}"


def _command(groups: Sequence[Group], advised: Sequence[Advice]) -> str:
    """Return the command that validation advises for the first task, or one that repeats a row."""
    if advised and advised[0].command is not None:
        return advised[0].command
    cells = [cell for group in groups for cell in group.cells]
    cells.sort(key=lambda cell: not cell.method.startswith("eva"))
    return next((command for cell in cells if (command := repeat_command(cell))), "")


def _charts(groups: Sequence[Group], methods: Sequence[str]) -> list[Chart]:
    named = [(_panel(group, cell, groups), cell) for group in groups for cell in group.cells]
    points = [
        Score(panel, cell.method, cell.score, _deviation(cell.scores))
        for panel, cell in named
        if cell.score is not None
    ]
    shown = []
    if points:
        note = (
            "Each method at its tuned rate; the line is a standard deviation over seeds each way."
        )
        shown.append(Chart("scores", "Test score", scores(points, methods), note))
    parts: tuple[tuple[str, str, Callable[[Cell], list[tuple[int, float]]]], ...] = (
        ("loss", "Validation loss", lambda cell: [(step, loss) for step, loss, _ in cell.curve]),
        (
            "score",
            "Validation score",
            lambda cell: [(step, score) for step, _, score in cell.curve if score is not None],
        ),
    )
    for name, title, points_of in parts:
        lines = [Curve(cell.method, points_of(cell), panel) for panel, cell in named]
        if any(len(line.points) > 1 for line in lines):
            spec = curves(lines, methods)
            shown.append(Chart(name, title, spec, "Mean over test seeds, at the tuned rates."))
    return shown


def _panel(group: Group, cell: Cell, groups: Sequence[Group]) -> str:
    """Return the name of the panel of a cell's task."""
    return cell.task if len(groups) == 1 else f"{group.domain} / {cell.task}"


def _deviation(values: Mapping[int, float | None]) -> float | None:
    known = [value or 0.0 for value in values.values()]
    return stdev(known) if len(known) > 1 else None


def _tables(
    summary: TunedSummary, answers: Sequence[Verdict], advised: Sequence[Advice]
) -> list[Table]:
    tables = []
    if advised:
        choices = [[text_cell(each.task), text_cell(each.text)] for each in advised]
        headings = ["task", "by validation"]
        tables.append(Table("advice", "What to train with", headings, choices, folded=False))
    claims = [
        [text_cell(answer.claim), text_cell(answer.outcome), text_cell(answer.text)]
        for answer in answers
    ]
    headings = ["claim", "outcome", "why"]
    tables.append(Table("verdicts", "Verdicts", headings, claims, folded=False))
    for number, group in enumerate(summary.groups, start=1):
        name = " ".join(filter(None, (group.domain, group.condition)))
        for kind, columns, rows in (
            ("methods", METHOD_HEADINGS, method_rows(group)),
            ("cells", CELL_HEADINGS, cell_rows(group)),
        ):
            lines = [[text_cell(text) for text in row] for row in rows]
            tables.append(Table(f"{kind}-{number}", f"{name}: {kind}", columns, lines))
    return tables


def _paragraphs(summary: TunedSummary) -> list[str]:
    reference = f"Differences are to {REFERENCE}, at its own tuned rate."
    return [text.replace("**", "") for text in protocol(summary) if text] + [reference]
