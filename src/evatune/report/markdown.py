"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evatune.utils.markup import markdown_text


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], words: int | None = None
) -> list[str]:
    """Return the lines of a table.

    Args:
        words: how many of the first columns stand to the left. Default: all.
    """
    left = len(headings) if words is None else words
    return [
        _row(headings),
        "|" + "---|" * left + "---:|" * (len(headings) - left),
        *(_row(map(markdown_text, row)) for row in rows),
    ]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
