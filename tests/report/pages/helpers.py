"""What a test reads of a page."""

from __future__ import annotations

import html.parser
import json
import re
from typing import Any


class Document(html.parser.HTMLParser):
    """The open elements, the references and the words of a page."""

    void = {"meta", "link", "br", "img", "hr", "input"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.references += named
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def specs(page: str) -> dict[str, Any]:
    """The plots of a page by their names."""
    found = re.search(r'id="specs">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return {one["name"]: one["spec"] for one in json.loads(found[1])}
