"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from evatune.adapters.saved import AdapterRow
from evatune.calibration.result import Calibration
from evatune.choices import SCALES
from evatune.report.evaluation import DROPPABLE, HEADINGS, TITLE, evaluation_cells
from evatune.report.summary import Figures, LayerRow
from evatune.report.text import (
    LAYER_HEADINGS,
    TYPE_HEADINGS,
    is_number,
    layer_cells,
    summary_lines,
    type_cells,
    verdict,
)
from evatune.utils.extras import extras
from evatune.utils.markup import printable

with extras(__name__):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

_LONG = 80
_PIPED_WIDTH = 250
_NO_LIMIT = 10_000
_IN_JSON = "--json has them."


def console() -> Console:
    """Return a console for stdout, wide enough for layer names where there is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_PIPED_WIDTH)


def show_calibration(
    terminal: Console, calibration: Calibration, scales: Sequence[str] = SCALES
) -> None:
    """Print the table, the result in a sentence, and what else there is to say.

    Args:
        scales: for which the learning rates are told.
    """
    figures = Figures.of(calibration)
    terminal.print(layers_table(terminal, figures.rows))
    terminal.print(plain(verdict(figures)), style="bold", soft_wrap=not terminal.is_terminal)
    terminal.print()
    say(terminal, *summary_lines(figures, scales))


def say(terminal: Console, *lines: str) -> None:
    """Print text as it is; folded at words on a terminal, left whole in a pipe."""
    for line in lines:
        terminal.print(plain(line), soft_wrap=not terminal.is_terminal)


def plain(text: str) -> Text:
    """Return a text that rich prints as it is.

    Brackets are no styles, colons no emoji, and nothing moves the cursor.
    """
    return Text(printable(text))


def layers_table(terminal: Console, rows: Sequence[LayerRow]) -> Table:
    """Return a table of layers, or of layer types where layers are too many or too wide."""
    by_layer = _per_layer(terminal, rows)
    has_types = len({row.type for row in rows}) < len(rows)
    too_wide = has_types and _width(terminal, by_layer) > terminal.width
    return _per_type(terminal, rows) if len(rows) > _LONG or too_wide else by_layer


def _per_layer(terminal: Console, rows: Sequence[LayerRow]) -> Table:
    styles = ["yellow" if row.attention else "" for row in rows]
    droppable = ("in→out", "rows", "parameters", "explained", "PR", "missed")
    return fitted_table(
        terminal,
        "What each layer got",
        LAYER_HEADINGS,
        layer_cells(rows),
        styles=styles,
        droppable=droppable,
    )


def _per_type(terminal: Console, rows: Sequence[LayerRow]) -> Table:
    droppable = (
        *("parameters", "layers", "worst", "PR median", "missed worst"),
        *("statuses", "captured mean", "mean"),
    )
    return fitted_table(
        terminal,
        "What each layer type got",
        TYPE_HEADINGS,
        type_cells(rows),
        droppable=droppable,
    )


def fitted_table(
    terminal: Console,
    title: str,
    headings: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    styles: Sequence[str] = (),
    droppable: Sequence[str] = (),
    sections: Collection[int] = (),
    notes: Sequence[str] = (_IN_JSON,),
) -> Table:
    """Return a table without as many of the `droppable` columns as a narrow terminal asks for.

    A line below it names those. Where even the others have no room, words are folded and numbers
    stay whole.

    Args:
        styles: of each line. droppable: headings, the most dispensable first.
        sections: places of the lines under which a rule is drawn.
        notes: lines below the table, of which the first says where columns left out are.
    """
    for dropped in range(len(droppable) + 1):
        gone = droppable[:dropped]
        table = Table(
            title=title or None,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            caption_justify="left",
        )
        kept = [index for index, heading in enumerate(headings) if heading not in gone]
        for index in kept:
            number = is_number(headings[index])
            table.add_column(
                headings[index],
                justify="right" if number else "left",
                no_wrap=number,
                overflow="fold",
            )
        for position, line in enumerate(lines):
            table.add_row(
                *(plain(line[index]) for index in kept),
                style=styles[position] if styles else "",
                end_section=position in sections,
            )
        left_out = [f"Left out for want of room: {', '.join(gone)}. {notes[0]}"] if gone else []
        table.caption = Text("\n").join(map(plain, [*left_out, *notes[1:]]))
        if _width(terminal, table) <= terminal.width:
            break
    return table


def _width(terminal: Console, table: Table) -> int:
    """Return how wide a table is that nothing bounds."""
    options = terminal.options.update(max_width=_NO_LIMIT)
    return Measurement.get(terminal, options, table).maximum


def evaluation_table(terminal: Console, tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a line per metric of each task that a run was measured on."""
    return fitted_table(terminal, TITLE, HEADINGS, evaluation_cells(tasks), droppable=DROPPABLE)


def adapter_table(terminal: Console, rows: Iterable[AdapterRow]) -> Table:
    """Return a table with a line per layer of a saved adapter."""
    headings = ("layer", "rank", "alpha", "scale", "parameters", "mean row norm of A", "norm of B")
    lines = [
        (
            row.layer,
            str(row.rank),
            f"{row.alpha:g}",
            f"{row.scale:g}",
            f"{row.parameters:,}",
            f"{row.a_row_norm:.4g}",
            f"{row.b_norm:.4g}",
        )
        for row in rows
    ]
    droppable = ("parameters", "mean row norm of A", "alpha")
    return fitted_table(terminal, "Adapter", headings, lines, droppable=droppable)
