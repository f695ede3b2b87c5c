"""Tables and curves of fine-tuning runs."""

from __future__ import annotations

import io
from dataclasses import fields
from typing import Any

import pytest
from rich.console import Console

from evatune.finetune.comparison.summary import Comparison, MeanStd, MethodSummary
from evatune.report.runs import comparison_markdown, comparison_table
from evatune.utils.markup import printable
from tests.helpers import NAMES, wide_terminal


def line(task: str, method: str = "eva", spread: float | None = None) -> MethodSummary:
    values: dict[str, Any] = {field.name: MeanStd(1.0, spread) for field in fields(MethodSummary)}
    return MethodSummary(
        **values
        | {
            "task": task,
            "method": method,
            "learning_rate": 1e-3,
            "seeds": 1,
            "best": True,
            "curve": [(1, 1.0, 1.0)],
        }
    )


@pytest.mark.parametrize("width", [40, 80, 250])
def test_a_terminal_of_any_width_shows_task_method_and_score_whole(width: int) -> None:
    tasks, methods = ("orientation", "commonsense"), ("lora-orthogonal", "eva")
    lines = [line(task, method, 0.012) for task in tasks for method in methods]
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    terminal.print(comparison_table(terminal, Comparison(lines, dict.fromkeys(tasks, 1.0))))
    text = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(row) <= width for row in text.splitlines())
    assert "…" not in text
    assert text.count("1.000 ± 0.012") == (4 if width == 40 else 8)
    headings = next(row for row in text.splitlines() if "score" in row)
    assert headings.split()[:3] == ["task", "method", "score"]
    # the narrowest folds names, and cuts nothing
    assert width == 40 or all(f" {name} " in text for name in (*tasks, *methods))
    assert ("Left out for want of room: grad B, init s" in " ".join(text.split())) == (width < 250)
    assert "best" not in text  # as every method has one rate
    assert ("comparison.md has them" in " ".join(text.split())) == (width < 250)


def test_a_comparison_shows_every_name_as_it_is() -> None:
    names = [*NAMES, "a|b", "`code`"]
    comparison = Comparison([line(name) for name in names], dict.fromkeys(names, 1.0))
    shown = wide_terminal()
    shown.print(comparison_table(shown, comparison))
    assert all(printable(name) in shown.file.getvalue() for name in names)  # type: ignore[attr-defined]
    text = comparison_markdown(comparison, "evatune compare 'a`b'")
    assert text.startswith("`` evatune compare 'a`b' ``\n")
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + len(names) + 1
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1
