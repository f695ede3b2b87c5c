"""Text for messages."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

ABSENT: Final = object()  # the value of a key that a mapping does not have
_NAMES_SHOWN, _NAME_LENGTH = 8, 40  # of names that come from the user's data


class Difference(NamedTuple):
    """A place where two JSON values differ, as keys with spaces between, and both values there."""

    where: str
    first: Any
    second: Any


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are: "a, b and 3 more"."""
    shown = ", ".join(names[:limit])
    hidden = len(names) - limit
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def listed(names: Sequence[str]) -> str:
    """Return the first names with commas between, long ones cut; "none" without any."""
    if not names:
        return "none"
    shown = []
    for name in names[:_NAMES_SHOWN]:
        shown.append(name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…")
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(shown) + more


def first_line(error: BaseException) -> str:
    """Return an error's first line as a sentence."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def one_line(error: BaseException, most: int = 300) -> str:
    """Return an error's text in one line, cut off after `most` characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def folded(text: str, indent: str) -> str:
    """Return a line folded at words on a terminal, whole in a pipe.

    Args:
        indent: of the lines after the first.
    """
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)


def first_difference(first: Any, second: Any) -> Difference | None:
    """Return the first place where two JSON values differ; None where they are the same.

    A key that one of two mappings lacks has the value ABSENT there.
    """
    if first == second:
        return None
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return Difference("", first, second)
    for key in dict.fromkeys([*first, *second]):
        inner = first_difference(first.get(key, ABSENT), second.get(key, ABSENT))
        if inner is not None:
            return inner._replace(where=f"{key} {inner.where}".strip())
    return None


def duration(seconds: float) -> str:
    """Return a duration for people: "9 s", "4 min", "2.5 h", "12 days"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 99.5:
        return f"{hours / 24:,.0f} days"
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{hours:.1f} h"


def size(count: float) -> str:
    """Return a number of bytes for people: "900 B", "35 MB", "1.2 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
