"""What every page has: one document, the result first, names as they are."""

from __future__ import annotations

import re

from evatune.report.pages.base import Chart, Page, Table, document, number_cell, text_cell
from evatune.report.vega import library
from tests.helpers import NAMES
from tests.report.pages.helpers import Document, specs


def page_of(name: str) -> str:
    values = [{"layer": name, "rank": 1}, {"layer": name, "rank": None}]
    spec = {"usermeta": {"fit": "plain"}, "data": {"values": values}}
    rows = [
        [text_cell(name, name), number_cell(0.25, ".0%")],
        [text_cell("b"), number_cell(None, "d")],
    ]
    return document(
        Page(
            title=name,
            facts={"model": name},
            verdict=name,
            command=name,
            charts=[Chart("plot", name, spec, name)],
            tables=[Table("table", name, ["layer", "share"], rows, name, marked={0})],
            notes=[name],
            settings={name: name},
        )
    )


def test_a_page_is_one_document_without_outside_references() -> None:
    text = page_of("a name")
    page = Document(text)
    assert page.open == []
    assert page.references == []
    assert not page.tags & {"link", "iframe", "img"}
    outside = text.replace(library(), "")
    assert "@import" not in outside
    assert not re.search(r"url\(", outside)
    assert len(text) < 500_000  # most of it is the library


def test_the_result_comes_first() -> None:
    text = page_of("x").partition("<body>")[2]
    places = [text.index(part) for part in ("<h1>", 'class="facts"', 'class="verdict"')]
    places += [text.index(part) for part in ('id="command"', 'class="charts"', "<details>")]
    assert places == sorted(places)


def test_a_page_shows_every_name_as_it_is() -> None:
    for name in NAMES:
        text = page_of(name)
        text.encode("utf-8")
        assert "<script>x" not in text
        assert "\x1b" not in text
        assert specs(text)["plot"]["data"]["layer"]["at"] == [0, 0]
    assert specs(page_of("</script><b>"))["plot"]["data"]["layer"]["words"] == ["</script><b>"]


def test_tables_carry_what_is_sorted_and_saved_beside_what_is_shown() -> None:
    text = page_of("x")
    assert '<td class="number" data-value="0.25">25%</td>' in text
    assert '<td class="number" data-value="">–</td>' in text
    assert '<tr class="marked"><td title="x">x</td>' in text
