"""Views of a result for `evatune.utils.shown`: text, HTML for a notebook, a table of figures.

Only the last needs a library, pandas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

from evatune.calibration.result import Calibration
from evatune.ranks.allocation import RankPlan
from evatune.report.summary import Figures, by_type, layer_rows, plan_of, split_name
from evatune.report.text import (
    LAYER_HEADINGS,
    TYPE_HEADINGS,
    is_number,
    layer_cells,
    percent,
    summary_lines,
    type_cells,
    verdict,
    with_minus,
)
from evatune.sketch.spectrum import Spectrum
from evatune.utils.markup import printable

if TYPE_CHECKING:
    import pandas

_WIDTH = 100
_FEW = 12  # layers that are listed one by one
_OF_LAYERS = ("layer", "rank", "PR", "explained", "captured", "status")
_OF_TYPES = (*("layer type", "layers", "rank min", "mean", "max"), *("captured mean", "statuses"))


@dataclass(frozen=True)
class View:
    """A result in words: what it is, a table, and sentences below it."""

    title: str
    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    lines: Sequence[str] = ()


def summary(value: Any) -> str:
    """Return a view as text: columns under each other, numbers to the right."""
    view = view_of(value)
    rows = [list(view.headings), *([printable(cell) for cell in row] for row in view.cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [is_number(heading) for heading in view.headings]
    table = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines = [_wrapped(printable(line)) for line in view.lines]
    return "\n".join([printable(view.title), "", *table, "", *lines]).rstrip()


def _wrapped(line: str) -> str:
    """Return a sentence in lines of a usual width, broken at spaces."""
    return fill(line, _WIDTH, break_long_words=False, break_on_hyphens=False)


def html(value: Any) -> str:
    """Return a view as HTML without a style of its own but for alignment."""
    view = view_of(value)
    sides = ["right" if is_number(heading) else "left" for heading in view.headings]
    head = _html_row("th", view.headings, sides)
    body = "".join(_html_row("td", row, sides) for row in view.cells)
    lines = "".join(f"<div>{_html_text(line)}</div>" for line in view.lines)
    return (
        f"<div><strong>{_html_text(view.title)}</strong></div>"
        f'<div style="overflow-x: auto"><table><thead>{head}</thead><tbody>{body}</tbody></table>'
        f'</div><div style="max-width: 60em">{lines}</div>'
    )


@singledispatch
def view_of(value: Any) -> View:
    """Return the view of a result."""
    raise TypeError(f"there is no view of {type(value).__name__}")


@view_of.register(Calibration)
def _(calibration: Calibration) -> View:
    figures = Figures.of(calibration)
    if len(figures.rows) <= _FEW:
        headings, cells = _chosen(_OF_LAYERS, LAYER_HEADINGS, layer_cells(figures.rows))
    else:
        headings, cells = _chosen(_OF_TYPES, TYPE_HEADINGS, type_cells(figures.rows))
    lines = [verdict(figures), *summary_lines(figures, ["matched"])]
    return View(repr(calibration).strip("<>"), headings, cells, lines)


@view_of.register(RankPlan)
def _(plan: RankPlan) -> View:
    types = by_type(plan.ranks)
    ranks = {kind: [plan.ranks[name] for name in names] for kind, names in types.items()}
    cells = [
        (
            layer_type,
            str(len(type_ranks)),
            str(min(type_ranks)),
            f"{sum(type_ranks) / len(type_ranks):.1f}",
            str(max(type_ranks)),
            with_minus(f"{sum(type_ranks) - plan.rank * len(type_ranks):+d}"),
        )
        for layer_type, type_ranks in ranks.items()
    ]
    headings = ("layer type", "layers", "rank min", "mean", "max", "against uniform")
    empty = [name for name, rank in plan.ranks.items() if rank == 0]
    lines = [
        f"The budget of {plan.limit:,} {plan.budget} is spent to {plan.spent:,}, with rho"
        f" {plan.rho:g} and the metric {plan.metric!r}."
    ]
    if empty:
        lines.append(f"{len(empty)} of {len(plan.ranks)} layers get no rank.")
    return View(repr(plan).strip("<>"), headings, cells, lines)


@view_of.register(Spectrum)
def _(spectrum: Spectrum) -> View:
    shares = spectrum.explained_variance_ratio.double().cumsum(0).tolist()
    fresh = _fresh_shares(spectrum)
    counts = [2**power for power in range(len(shares).bit_length()) if 2**power < len(shares)]
    counts += [len(shares)] if shares else []
    cells = [
        (
            str(count),
            percent(shares[count - 1]),
            percent(sum(fresh[:count]) if count <= len(fresh) else None),
        )
        for count in counts
    ]
    lines = [
        f"Participation ratio {spectrum.participation_ratio:.1f}: the effective number of"
        f" directions out of {spectrum.directions.shape[1]}."
    ]
    if spectrum.certificate is not None:
        lines.append(f"Captured: of {spectrum.certificate.rows:,} rows that had no part in it.")
    headings = ("directions", "explained", "captured")
    return View(repr(spectrum).strip("<>"), headings, cells, lines)


@singledispatch
def frame(value: Any) -> pandas.DataFrame:
    """Return the figures of a result as a DataFrame."""
    raise TypeError(f"there is no table of {type(value).__name__}")


@frame.register(Calibration)
def _(calibration: Calibration) -> pandas.DataFrame:
    plan, _ = plan_of(calibration)
    facts = [row.facts() for row in layer_rows(calibration, plan)]
    return _frame(facts, "name").drop(columns=["advice", "attention"])


@frame.register(RankPlan)
def _(plan: RankPlan) -> pandas.DataFrame:
    facts = []
    for name, rank in plan.ranks.items():
        block, layer_type = split_name(name)
        facts.append(
            {
                "name": name,
                "block": block,
                "type": layer_type,
                "rank": rank,
                "against_uniform": rank - plan.rank,
            }
        )
    return _frame(facts, "name")


@frame.register(Spectrum)
def _(spectrum: Spectrum) -> pandas.DataFrame:
    shares = spectrum.explained_variance_ratio.double()
    fresh = _fresh_shares(spectrum)
    energies, cumulative = spectrum.energies.tolist(), shares.cumsum(0).tolist()
    facts = [
        {
            "component": number,
            "energy": energies[number - 1],
            "explained": share,
            "cumulative": cumulative[number - 1],
            "captured": fresh[number - 1] if number <= len(fresh) else None,
        }
        for number, share in enumerate(shares.tolist(), start=1)
    ]
    return _frame(facts, "component")


def _frame(facts: Iterable[dict[str, Any]], index: str) -> pandas.DataFrame:
    import pandas

    rows = [{key: _storable(value) for key, value in row.items()} for row in facts]
    columns = list(rows[0]) if rows else [index]
    return pandas.DataFrame(rows, columns=columns).set_index(index)


def _storable(value: Any) -> Any:
    """Return text with half a surrogate pair written out, which pandas cannot hold."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _fresh_shares(spectrum: Spectrum) -> list[float]:
    """Return the share of fresh rows' energy along each known direction."""
    certificate = spectrum.certificate
    if certificate is None or certificate.total_energy <= 0:
        return []
    shares: list[float] = (certificate.energies.double() / certificate.total_energy).tolist()
    return shares


def _chosen(
    wanted: Sequence[str], headings: Sequence[str], cells: Sequence[Sequence[str]]
) -> tuple[Sequence[str], list[list[str]]]:
    """Return the columns of a table with these headings."""
    columns = [headings.index(heading) for heading in wanted]
    return wanted, [[row[column] for column in columns] for row in cells]


def _html_row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    row = (
        f'<{tag} style="text-align: {side}">{_html_text(cell)}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(row)}</tr>"


def _html_text(text: str) -> str:
    return escape(printable(text)).replace("$", "&#36;")  # between which notebooks set formulas
