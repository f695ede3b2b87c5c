"""The report page of a calibration."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

from evatune.report.page import render

import evatune
from evatune.report.tables import percent, rate_text


class Page(html.parser.HTMLParser):
    void = {"meta", "link", "br", "img", "hr"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [
            value or ""
            for name, value in attrs
            if name.rpartition(":")[2] in ("src", "href", "srcset")
        ]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_document_without_outside_references(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert {"svg", "table", "style"} <= page.tags
    assert not page.tags & {"script", "link", "iframe", "img"}
    assert all(reference.startswith("#") for reference in page.references)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", text))
    assert "@import" not in text


def test_the_report_shows_every_layer_and_setting(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    calibration = evatune.Calibration.load(written / "calibration.safetensors")
    assert all(f"<td>{name}</td>" in text for name in calibration.layers)
    assert "<th>seed</th><td>3</td>" in text
    rate = rate_text(calibration.learning_rate(2e-4, scale="paper"))
    assert f"<p>A LoRA rate of 2e-4 corresponds to {rate} at scale=paper, where κ is " in text
    assert "<p>Participation ratio PR, " in text
    assert f"<p>Estimated miss: {percent(calibration.estimated_missed)} of the energy" in text
    assert '<th class="number">missed</th>' in text
    without_scale = render(calibration, calibration.allocate(), {}, None)
    assert "LoRA rate" not in without_scale
    assert "<p>Participation ratio PR, " in without_scale
