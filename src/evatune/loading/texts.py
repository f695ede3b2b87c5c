"""Texts from a hub or from files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evatune.loading.columns import find_records, text_column
from evatune.loading.records import Origin
from evatune.loading.tables import load_table

CHARACTERS_PER_TOKEN = 64  # many more than texts have


def load_texts(source: str | Path, column: str | None = None, *, split: str = "train") -> Any:
    """Return texts as a `datasets.Dataset` with one column, "text".

    Args:
        source, split: see `evatune.loading.tables.load_table`.
        column: which column holds the text; default "text", else the only column of strings.

    Raises:
        DataError: nothing there, no such column, or no text.
    """
    table = load_table(source, split)
    origin = Origin(str(source))
    column = text_column(table, origin) if column is None else column
    texts = find_records(table, [column], origin).table
    return texts if column == "text" else texts.rename_column(column, "text")


def truncate_texts(texts: Iterable[str], tokenizer: Any, tokens: int) -> list[str]:
    """Return the texts without what lies far beyond so many tokens.

    Tokenizers read a text to its end before they cut it.
    """
    longest = tokens * CHARACTERS_PER_TOKEN
    if tokenizer.truncation_side == "left":
        return [text[-longest:] for text in texts]
    return [text[:longest] for text in texts]
