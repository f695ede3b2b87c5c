"""The self-contained HTML page of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from evatune.calibration.result import Calibration
from evatune.choices import DEFAULT_SCALE
from evatune.ranks.allocation import RankPlan
from evatune.report import plots
from evatune.report.summary import LayerRow, layer_rows, totals
from evatune.report.tables import effective, percent, summary_lines
from evatune.utils.extras import extras
from evatune.utils.markup import printable

with extras(__name__):
    import jinja2


def render(
    calibration: Calibration,
    plan: RankPlan,
    settings: Mapping[str, Any],
    scale: str | None = DEFAULT_SCALE,
) -> str:
    """Return one HTML document without outside references.

    Args:
        settings: what the run was called with, shown as is at the end.
        scale: of the rows of A, for what is said about learning rates; None: nothing is said.
    """
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = percent
    environment.filters["effective"] = effective
    template = environment.from_string(
        files("evatune.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    rows = layer_rows(calibration, plan)
    return template.render(
        calibration=calibration,
        plan=plan,
        rows=rows,
        totals=totals(calibration, plan),
        lines=summary_lines(calibration, plan, [scale] if scale else []),
        heat=_heat(rows, plan),
        spectra=plots.spectra(calibration, plan),
        energies=plots.energies(rows),
        settings={**settings, **asdict(calibration.config)},
    )


def _shown(value: Any) -> Any:
    """Return text without signs that no page can show; what is markup already is ours."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _heat(rows: list[LayerRow], plan: RankPlan) -> dict[str, Any]:
    """Return the rank per block (down) and layer type (across).

    Layers without a block number have a line of their own.
    """
    types = list(dict.fromkeys(row.type for row in rows))
    blocks = list(dict.fromkeys(row.block for row in rows))
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    top = max([row.rank for row in rows], default=1) or 1
    for row in rows:
        strength = row.rank / top
        cells[row.block, row.type] = {
            "rank": row.rank,
            # From white to a dark blue; the text turns white where the ground is dark.
            "background": f"rgba(31, 95, 168, {strength:.2f})",
            "color": "#fff" if strength > 0.6 else "#1b2733",
            "title": (
                f"{row.name}: rank {row.rank} (uniform: {plan.rank}), captured"
                f" {percent(row.captured)}, {row.status}"
            ),
        }
    return {"types": types, "blocks": blocks, "cells": cells}
