"""Rows of the tables of an evaluation, one for each measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evatune.report.text import or_dash

TITLE = "Measured on standard tasks"
HEADINGS = ("task", "metric", "score", "standard error", "examples")
DROPPABLE = ("examples", "standard error")


def evaluation_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return task, metric, score, standard error and number of examples, a row per metric.

    Args:
        tasks: as in `evaluation.json`.
    """
    return [
        (name, metric, measure["score"], measure["standard_error"], task["examples"])
        for name, task in tasks.items()
        for metric, measure in task["measures"].items()
    ]


def evaluation_cells(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows as text."""
    return [
        (name, metric, or_dash(score, ".4f"), or_dash(error, ".4f"), or_dash(examples, ",d"))
        for name, metric, score, error, examples in evaluation_rows(tasks)
    ]
