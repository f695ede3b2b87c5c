"""Rows and totals that tables, page and `--json` show."""

from __future__ import annotations

import pytest

import evatune
from evatune.report.summary import Figures, split_name


@pytest.mark.parametrize(
    ("name", "block", "layer_type"),
    [
        ("encoder.layer.3.attention.self.query", "3", "attention.self.query"),
        ("layers.0.experts.5.up", "0.5", "experts.up"),
        ("0.1", "0.1", "0.1"),
        ("pooler.dense", "", "pooler.dense"),
    ],
)
def test_a_name_is_split_into_block_and_type(name: str, block: str, layer_type: str) -> None:
    assert split_name(name) == (block, layer_type)


def test_totals_are_those_of_the_rows(calibration: evatune.Calibration) -> None:
    figures = Figures.of(calibration)
    rows = [row for row in figures.rows if row.rank]
    captured = [row.captured for row in rows if row.captured is not None]
    totals = figures.totals
    assert figures.problem is None
    assert totals.parameters == sum(row.parameters for row in rows)
    assert totals.ranks == sum(row.rank for row in rows)
    assert totals.captured_mean == pytest.approx(sum(captured) / len(captured))
    assert totals.captured_worst == min(captured)
    missed = [row.estimated_missed for row in rows if row.estimated_missed is not None]
    assert totals.estimated_missed is not None
    assert min(missed) < totals.estimated_missed < max(missed)
    assert [row.facts()["estimated_missed"] for row in rows] == missed
