"""The parts of every page, and the one self-contained HTML document of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from evatune.report.text import or_dash
from evatune.report.vega import Spec, library
from evatune.utils.extras import extras
from evatune.utils.markup import printable, printable_in
from evatune.version import __version__

with extras(__name__):
    import jinja2
    from markupsafe import Markup


@dataclass(frozen=True)
class Tile:
    """A figure in large type, and what it is."""

    value: str
    label: str


@dataclass(frozen=True)
class Chart:
    """A plot that answers to the pointer.

    Attributes:
        name: of the files that it can be saved as. note: what the reader must know to read it.
    """

    name: str
    title: str
    spec: Spec
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is sorted and saved, and what is shown."""

    value: str | float | None
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted, filtered and saved.

    Attributes:
        headings: of columns. marked: rows that ask for a look. folded: behind a line to click on.
    """

    name: str
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    marked: Collection[int] = ()
    folded: bool = True


@dataclass(frozen=True)
class Page:
    """All that a page says, the result first.

    Attributes:
        facts: what it is about: model, data, method, …
        verdict: the result in one sentence. command: what to do next, to copy.
        notes: sentences for those who want to know more. settings: shown as they are.
    """

    title: str
    facts: Mapping[str, str]
    verdict: str
    command: str
    tiles: Sequence[Tile] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def document(page: Page) -> str:
    """Return one HTML document without outside references."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.from_string(_part("page.html.j2"))
    about = {"date": datetime.date.today().isoformat(), "evatune": __version__}
    return template.render(
        page=page,
        facts=dict(page.facts) | about,
        styles=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        specs=Markup(_json([_packed(chart) for chart in page.charts])),
        library=Markup(library() if page.charts else ""),
    )


def text_cell(text: str, hint: str = "") -> Cell:
    """Return a cell of words."""
    return Cell(text, text, hint)


def number_cell(value: float | None, form: str) -> Cell:
    """Return a cell of a number in a form such as ",d" or ".1%"; a dash where there is none."""
    return Cell(value, or_dash(value, form))


def _part(name: str) -> str:
    return files("evatune.report.pages").joinpath(name).read_text(encoding="utf-8")


def _packed(chart: Chart) -> dict[str, Any]:
    """Return a plot with its data by column, words as places in a list: a tenth of the size."""
    values = chart.spec["data"]["values"]
    columns = {}
    for key in dict.fromkeys(key for value in values for key in value):
        column = [value.get(key) for value in values]
        words = {word: number for number, word in enumerate(dict.fromkeys(column))}
        if any(isinstance(word, str) for word in words):
            columns[key] = {"words": list(words), "at": [words[word] for word in column]}
        else:
            columns[key] = {"numbers": column}
    return {"name": chart.name, "spec": {**chart.spec, "data": columns}}


def _json(value: Any) -> str:
    """Return JSON that may stand in a script of a page: nothing in it ends the script."""
    text = json.dumps(printable_in(value), separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c")


def _shown(value: Any) -> Any:
    """Return text without signs that no page can show; what is markup already is ours."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
