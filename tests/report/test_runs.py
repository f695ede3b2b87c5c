"""Tables and curves of fine-tuning runs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from evatune.finetune.summary import Comparison, MeanStd, MethodSummary
from evatune.report.runs import comparison_markdown, comparison_table
from evatune.utils.markup import printable
from tests.helpers import NAMES, wide_terminal


def test_a_comparison_shows_every_name_as_it_is() -> None:
    def line(task: str) -> MethodSummary:
        values: dict[str, Any] = {field.name: MeanStd(1.0, None) for field in fields(MethodSummary)}
        return MethodSummary(
            **values
            | {
                "task": task,
                "method": "eva",
                "learning_rate": 1e-3,
                "seeds": 1,
                "best": True,
                "curve": [(1, 1.0, 1.0)],
            }
        )

    names = [*NAMES, "a|b", "`code`"]
    comparison = Comparison([line(name) for name in names], dict.fromkeys(names, 1.0))
    shown = wide_terminal()
    shown.print(comparison_table(comparison))
    assert all(printable(name) in shown.file.getvalue() for name in names)  # type: ignore[attr-defined]
    text = comparison_markdown(comparison, "evatune compare 'a`b'")
    assert text.startswith("`` evatune compare 'a`b' ``\n")
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + len(names) + 1
    assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1
