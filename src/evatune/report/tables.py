"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evatune.calibration import Calibration
from evatune.ranks import RankPlan
from evatune.report.summary import LayerRow, layer_rows, totals

_LONG = 80
_PIPED_WIDTH = 130


def console() -> Console:
    """For tables on stdout; wide enough for layer names where no terminal says how wide it is."""
    found = Console()
    return found if found.is_terminal else Console(width=_PIPED_WIDTH)


def calibration_table(calibration: Calibration, plan: RankPlan) -> Table:
    """One line per layer, or per layer type where that would be more than a screen or two."""
    rows = layer_rows(calibration, plan)
    return _per_layer(rows) if len(rows) <= _LONG else _per_type(rows)


def _per_layer(rows: list[LayerRow]) -> Table:
    table = Table(title="What each layer got", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("in→out", "rank", "parameters", "rows", "explained", "captured"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, f"{row.in_features}→{row.out_features}", str(row.rank), f"{row.parameters:,}", f"{row.rows:,}",
            percent(row.explained), percent(row.captured), row.status, style="yellow" if row.attention else "",
        )  # fmt: skip
    return table


def _per_type(rows: list[LayerRow]) -> Table:
    table = Table("layer type", title="What each layer type got", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("layers", "rank min", "mean", "max", "parameters", "captured mean", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("statuses")
    for kind in dict.fromkeys(row.type for row in rows):
        some = [row for row in rows if row.type == kind]
        ranks = [row.rank for row in some]
        captured = [row.captured for row in some if row.captured is not None]
        counts = {status: sum(r.status == status for r in some) for status in dict.fromkeys(r.status for r in some)}
        table.add_row(
            kind, str(len(some)), str(min(ranks)), f"{sum(ranks) / len(ranks):.1f}", str(max(ranks)),
            f"{sum(row.parameters for row in some):,}", percent(sum(captured) / len(captured) if captured else None),
            percent(min(captured, default=None)), ", ".join(f"{n} {status}" for status, n in counts.items()),
        )  # fmt: skip
    return table


def summary_lines(calibration: Calibration, plan: RankPlan) -> list[str]:
    """What stands below the table."""
    t = totals(calibration, plan)
    change = t["parameters"] / t["uniform_parameters"] - 1 if t["uniform_parameters"] else 0.0
    lines = [
        f"{t['layers']} layers with {t['distinct_inputs']} distinct inputs, {t['batches']} batches; "
        f"{t['ranks']} ranks, {t['parameters']:,} parameters ({change:+.1%} against LoRA of rank {plan.rank} everywhere)",
    ]
    if t["captured_mean"] is not None:
        lines.append(
            f"Energy of unseen rows inside the chosen directions: {percent(t['captured_mean'])} on average, "
            f"{percent(t['captured_worst'])} in the worst layer; {percent(t['of_achievable_mean'])} and "
            f"{percent(t['of_achievable_worst'])} of what the same ranks explain of the rows that chose them"
        )
    for status in dict.fromkeys(calibration.status.values()):
        if status != "converged":
            names = [name for name, own in calibration.status.items() if own == status]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{status}: {shown}. {status.advice[0].upper()}{status.advice[1:]}.")
    return lines


def adapter_table(rows: Iterable[dict[str, Any]]) -> Table:
    """One line per layer of a saved adapter."""
    table = Table("layer", title="Adapter", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("rank", "alpha", "scale", "parameters", "mean row norm of A", "norm of B"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["layer"], str(row["rank"]), f"{row['alpha']:g}", f"{row['scale']:g}", f"{row['parameters']:,}",
            f"{row['a_row_norm']:.4g}", f"{row['b_norm']:.4g}",
        )  # fmt: skip
    return table


def percent(share: float | None) -> str:
    """A share in [0, 1] for people; a dash where there is none."""
    return "–" if share is None else f"{share:.1%}"
