"""Rows of the tables of an evaluation, one for each measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLE = "Measured on standard tasks"
HEADINGS = ("task", "metric", "score", "standard error", "examples")
SPARE = ("examples", "standard error")


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
        (name, metric, _text(score, ".4f"), _text(error, ".4f"), _text(examples, ",d"))
        for name, metric, score, error, examples in evaluation_rows(tasks)
    ]


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
