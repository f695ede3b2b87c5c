"""Names of layers, models and files are other people's text: what a format would take for its own
signs is escaped here.

HTML is escaped by Jinja, and YAML by its own writer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def printable(text: str) -> str:
    """Return a text with what a terminal would obey, and line ends, written out: "\\x1b"."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def printable_in(value: Any) -> Any:
    """Return plain values, as JSON holds them, with all text in them as `printable` has it."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: printable_in(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_in(inner) for inner in value]
    return value


def plot_text(text: str) -> str:
    """Return a text that matplotlib draws as it is, with no formula between dollars.

    Legends leave out labels that begin with an underscore, so a space comes before that.
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, in a cell of a table too."""
    return re.sub(r"[\\`*|<\[]", r"\\\g<0>", printable(text))


def markdown_code(text: str) -> str:
    """Return a text as code in a line of Markdown: between more backticks than it has in a row."""
    shown = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"
