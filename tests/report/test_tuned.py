"""Pages of a tuned comparison, whole and in part."""

from __future__ import annotations

import itertools
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from evatune.errors import ConfigError
from evatune.finetune.comparison.tuned_cells import TunedSummary
from evatune.finetune.comparison.tuned_summary import summarize
from evatune.report.tuned import tuned_tables
from evatune.report.tuned_markdown import domain_page, overview_page, write_pages
from tests.helpers import wide_terminal
from tests.tuned_lines import line_of, tuned_lines


def test_pages_hold_their_pictures(tmp_path: Path) -> None:
    summary = summarize(tuned_lines(tasks=("digits",), methods=("lora", "eva")))
    write_pages(summary, tmp_path, "make results")
    page = (tmp_path / "images.md").read_text()
    for kind in ("forest", "curves", "loss-by-rate", "score-by-rate", "ranks"):
        assert f"(images-{kind}.svg)](images-{kind}.png)" in page
        assert "<text" in (tmp_path / f"images-{kind}.svg").read_text()
    assert "[images](images.md)" in (tmp_path / "README.md").read_text()


def test_every_row_of_a_table_has_as_many_cells() -> None:
    methods = ("full", "lora", "eva", "lora-orthogonal")
    summary = summarize(tuned_lines(tasks=("digits", "fonts"), methods=methods))
    for text in (overview_page(summary, "make"), domain_page(summary, "images", "make")):
        rows = [line.replace(r"\|", "") for line in text.splitlines()]
        for before, row in itertools.pairwise(rows):
            if before.startswith("|") and row.startswith("|"):
                assert before.count("|") == row.count("|")
    terminal = wide_terminal()
    terminal.print(*tuned_tables(summary, terminal))
    assert "lora-orthogonal" in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_a_narrow_terminal_has_whole_scores_and_fewer_columns() -> None:
    summary = summarize(tuned_lines(tasks=("digits",), methods=("lora", "eva")))
    terminal = Console(width=80, file=StringIO())
    terminal.print(*tuned_tables(summary, terminal))
    printed = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    assert re.search(r"digits +eva +0\.0025 +7\d\.\d ± 0\.\d", printed)
    assert "Left out for want of room: PR, κ, train s" in " ".join(printed.split())


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    lines = [line_of("images", "digits", "lora", 0.1, 0, False, diverged=True)]
    lines += [line for line in tuned_lines(tasks=("digits",), methods=("eva",)) if not line.tested]
    summary = summarize(lines)
    page = domain_page(summary, "images", "make results")
    assert "**1 of 2 cells diverged at every rate, or have no run that chooses one**: lora" in page
    assert "**1 of 2 cells have no test yet at the chosen rate**: eva on digits." in page
    assert "Nothing to draw yet." in page
    assert "no command repeats one" in page
    assert "Nothing can be held against LoRA yet." in overview_page(summary, "make results")
    with pytest.raises(ConfigError, match="no finished runs"):
        write_pages(TunedSummary((), 0), tmp_path, "make results")
