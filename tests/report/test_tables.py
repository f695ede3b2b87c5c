"""Tables for the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import evatune
from evatune.adapters.saved import AdapterRow
from evatune.report.tables import adapter_table, show_calibration
from evatune.utils.markup import printable
from tests.helpers import NAMES, wide_terminal


def test_a_table_shows_every_name_as_it_is(calibration: evatune.Calibration) -> None:
    shown = wide_terminal()
    show_calibration(shown, calibration)
    rows = [AdapterRow(name, 1, 1.0, 1.0, 1, a_row_norm=1.0, b_norm=1.0) for name in NAMES]
    shown.print(adapter_table(shown, rows))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert all(text.count(printable(name)) >= 2 for name in NAMES)
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [80, 250])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_names(written: Path, width: int) -> None:
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show_calibration(terminal, calibration)
    text = terminal.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert all(f" {name} " in text for name in calibration.layers)
    assert ("Left out for want of room: in→out" in text) == (width == 80)


def test_where_layers_are_too_wide_their_types_are_shown(written: Path) -> None:
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    terminal = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    show_calibration(terminal, calibration)
    text = terminal.file.getvalue()
    assert all(len(line) <= 40 for line in text.splitlines())
    assert all(f" {kind} " in text for kind in ("layer type", "attention.self.query"))
    assert "encoder.layer.0.attention" not in text
