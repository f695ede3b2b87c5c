"""Rows of a tuned comparison, its tables for the terminal, and its facts for `--json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median, stdev
from typing import Any

from evatune.finetune.comparison.statistics import DomainDifference, PairedDifference
from evatune.finetune.comparison.tuned_cells import Cell, Group, TunedSummary
from evatune.report.advice import advice, repeat_command
from evatune.report.evidence import (
    compared,
    difference_text,
    interval_text,
    score_differences,
    signed,
)
from evatune.report.tables import fitted_table
from evatune.report.text import NONE, or_dash
from evatune.report.verdicts import verdicts
from evatune.utils.extras import extras

with extras(__name__):
    from rich.console import Console
    from rich.table import Table

METHOD_HEADINGS = (
    "method", "score", "less LoRA's: these tasks", "tasks like these", "bootstrap", "p (Holm)",
    "won, tied, lost", "mean rank", "steps to LoRA's loss", "steps to 90 % of full", "area saved",
    "parameters", "init s", "train s", "memory MB",
)  # fmt: skip
CELL_HEADINGS = (
    "task", "method", "rate", "score", "less LoRA's", "loss", "steps to LoRA's loss",
    "steps to 90 % of full", "parameters", "train s", "κ", "PR",
)  # fmt: skip
_DROPPABLE = (  # of a narrow terminal, the most dispensable first
    "PR", "κ", "train s", "parameters", "steps to 90 % of full", "loss", "steps to LoRA's loss",
)  # fmt: skip
LEGEND = (
    "Scores in points (hundredths), ± the standard deviation over seeds. Differences to LoRA are"
    " paired by seed, with 95 % intervals: on these tasks (t over seeds), on tasks like these (t"
    " over tasks), and by a hierarchical bootstrap over tasks and seeds, which is too narrow with"
    " few tasks. p is that of these tasks. Mean rank: 1 is the best. Steps: median over seeds, of a"
    " run; – where more than half never get there. To LoRA's loss, of methods that are alike, half"
    " of the runs get before their end and half never: the verdict takes a loss that both reach."
    " Area saved: how much more of LoRA's improvement"
    " is there, mean over the steps. Seconds and memory are medians, and of a machine that did"
    " other work beside."
)


def overview_lines(summary: TunedSummary) -> list[str]:
    """Return the verdicts as lines for the terminal."""
    return [
        f"{' '.join(filter(None, (group.domain, group.condition)))}: {verdict.claim}"
        f" {verdict.outcome.capitalize()}. {verdict.text}"
        for group in summary.groups
        for verdict in verdicts([group])
    ]


def method_rows(group: Group) -> list[list[str]]:
    """Return a row per method over the tasks of a domain, the best score first."""
    scores = score_differences([group])
    areas = compared(group.area_saved())
    differences = {line.method: line for line in (scores.methods if scores else ())}
    areas_by_method = {line.method: line.mean for line in (areas.methods if areas else ())}
    rows = []
    for method in sorted(group.methods, key=lambda name: -_mean_score(group, name)):
        cells = group.of(method)
        score = _mean_score(group, method)
        row = [method, NONE if math.isinf(score) else f"{100 * score:.1f}"]
        row += _difference_cells(differences.get(method))
        rank = scores.ranks.ranks.get(method) if scores else None
        area = areas_by_method.get(method)
        row += [
            or_dash(rank, ".1f"),
            _share(cells, lambda cell: cell.convergence.to_reference),
            _share(cells, lambda cell: cell.convergence.to_full),
            NONE if area is None else signed(area),
            _median(cells, _count, ",.0f"),
            _median(cells, lambda cell: cell.init_seconds, ".1f"),
            _median(cells, lambda cell: cell.train_seconds, ".1f"),
            _median(cells, _megabytes, ".0f"),
        ]
        rows.append(row)
    return rows


def _difference_cells(line: DomainDifference | None) -> list[str]:
    if line is None:
        return [NONE] * 5
    bootstrap = line.bootstrap
    return [
        difference_text(line.mean, line.fixed_tasks),
        interval_text(line.random_tasks).strip() or NONE,
        f"[{signed(bootstrap.low)}, {signed(bootstrap.high)}]" if bootstrap else NONE,
        or_dash(line.fixed_tasks_holm, ".2g"),
        f"{line.wins}, {line.ties}, {line.losses}",
    ]


def _mean_score(group: Group, method: str) -> float:
    """Return the mean test score over the tasks; −∞ where one lacks."""
    scores = [cell.score for cell in group.of(method)]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(group.tasks) else -math.inf


def cell_rows(group: Group) -> list[list[str]]:
    """Return a row per task and method, the best score of a task first."""
    comparison = score_differences([group])
    lines = comparison.paired if comparison else ()
    paired = {(line.task, line.method): line for line in lines}
    cells = sorted(
        group.cells, key=lambda cell: (group.tasks.index(cell.task), -_or(cell.score, -1.0))
    )
    return [_cell_row(cell, paired.get((cell.task, cell.method))) for cell in cells]


def _cell_row(cell: Cell, paired: PairedDifference | None) -> list[str]:
    mark = " *" if cell.at_edge else ""
    diverged = sum(score is None for score in cell.scores.values())
    return [
        cell.task,
        cell.method,
        "diverged" if cell.rate is None else f"{cell.rate:.3g}{mark}",
        _over_seeds([100 * (score or 0.0) for score in cell.scores.values()], ".1f")
        + (f" ({diverged} diverged)" if diverged else ""),
        difference_text(paired.mean, paired.test) if paired else NONE,
        _over_seeds([loss for loss in cell.losses.values() if loss is not None], ".3f"),
        _steps(cell.convergence.to_reference),
        _steps(cell.convergence.to_full),
        _median([cell], _count, ",.0f"),
        _median([cell], lambda cell: cell.train_seconds, ".1f"),
        _median([cell], lambda cell: cell.kappa, ".2f"),
        _median([cell], lambda cell: cell.participation, ".1f"),
    ]


def _count(cell: Cell) -> float | None:
    return median(cell.parameters.values()) if cell.parameters else None


def _megabytes(cell: Cell) -> float | None:
    return cell.peak_memory_bytes / 2**20 if cell.peak_memory_bytes else None


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _over_seeds(values: Sequence[float], form: str) -> str:
    if not values:
        return NONE
    mean = sum(values) / len(values)
    return f"{mean:{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def _steps(steps: Mapping[int, float]) -> str:
    middle = median(steps.values()) if steps else math.inf
    if not steps or math.isinf(middle):
        return NONE
    reached = sum(map(math.isfinite, steps.values()))
    return f"{middle:.0f}" + ("" if reached == len(steps) else f" ({reached} of {len(steps)})")


def _share(cells: Sequence[Cell], steps: Callable[[Cell], Mapping[int, float]]) -> str:
    """Return the steps as a share of a run, in the median over tasks."""
    shares = [median(steps(cell).values()) / cell.steps for cell in cells if steps(cell)]
    middle = median(shares) if shares else math.inf
    return NONE if math.isinf(middle) else f"{100 * middle:.0f} %"


def _median(cells: Sequence[Cell], of: Callable[[Cell], float | None], form: str) -> str:
    values = [value for value in map(of, cells) if value is not None]
    return or_dash(median(values) if values else None, form)


def tuned_tables(summary: TunedSummary, terminal: Console) -> list[Table]:
    """Return a table per domain and condition, as wide as the terminal allows."""
    return [
        fitted_table(
            terminal,
            f"{group.domain} {group.condition}".strip(),
            CELL_HEADINGS,
            cell_rows(group),
            droppable=_DROPPABLE,
        )
        for group in summary.groups
    ]


def tuned_facts(summary: TunedSummary) -> dict[str, Any]:
    """Return verdicts and cells for `--json`; what is not finite is None."""
    return {
        "verdicts": [
            {"domain": group.domain, "condition": group.condition} | asdict(verdict)
            for group in summary.groups
            for verdict in verdicts([group])
        ],
        "advice": [
            {"domain": group.domain, "condition": group.condition} | asdict(each)
            for group in summary.groups
            for each in advice(group)
        ],
        "cells": [
            {
                "domain": group.domain,
                "condition": group.condition,
                "task": cell.task,
                "method": cell.method,
                "learning_rate": cell.rate,
                "inside": cell.inside,
                "score": cell.score,
                "scores": dict(cell.scores),
                "command": repeat_command(cell),
            }
            for group in summary.groups
            for cell in group.cells
        ],
    }
