"""The columns of a data set: which of them hold records, texts, images or audio.

Recognition has its one home here, for every command that reads data of the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError, DataError
from evatune.loading.data_files import kind_of
from evatune.loading.file_checks import json_name
from evatune.loading.records import Kind, Layout, Origin, Records
from evatune.utils.extras import extras
from evatune.utils.text import listed

with extras(__name__):
    import datasets
    import pyarrow.compute as pc

LABEL_COLUMNS = ("label", "labels")
_TEXT = "text"
_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_CHAT_KEYS = ({"role", "content"}, {"from", "value"})  # of a message, as trainers take them
_PAIRS = (  # prompt and completion, as data sets call them
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
)
_INSTRUCTION = ("instruction", "input", "output")  # Alpaca's, the second may be missing
_MEDIA = {"images": (datasets.Image, "image"), "audio": (datasets.Audio, "audio")}
_PREFERENCE = {"chosen", "rejected"}


def find_records(
    table: Any, columns: Sequence[str], origin: Origin, ignored: Sequence[str] = ()
) -> Records:
    """Return the records of a table, in the columns given or in those that it is recognized by.

    Looked for are, in this order: a column of chats; `prompt` and `completion` (or what other data
    sets call them); `instruction`, `input` and `output`; `text`; the only column of strings.
    Answers may be numbers, which are read as text.

    Args:
        table: a `datasets.Dataset`. columns: one of chats or texts; two, prompt and completion;
            three, instruction, input and output; none: they are recognized.
        ignored: columns that hold no text, such as a label's.

    Raises:
        DataError: nothing is recognized, a column is missing or does not hold strings, rows are of
            different shapes, or none holds anything. ConfigError: more than three columns.
    """
    table = _answers_as_text(table, columns)
    layout = _named(table, columns, origin) if columns else _recognized(table, origin, ignored)
    _require_one_shape(table, layout, columns, origin)
    whole = table.select_columns(list(layout.columns))
    # In memory, eight bytes a row: else a folder that `datasets` saved would get cache files.
    whole = whole.filter(_Whole(layout), keep_in_memory=True)
    if len(whole) == 0:
        what = {"text": "text", "chat": "chat"}.get(layout.kind, "answer")
        raise DataError(
            f"{origin.source!r} holds no {what}: every entry of column {layout.columns[-1]!r} is"
            f" empty; give data with {what} in it"
        )
    return Records(whole, layout, origin)


def text_column(table: Any, origin: Origin, ignored: Sequence[str] = ()) -> str:
    """Return the column of texts: "text", or the only one of strings. DataError without one."""
    if _TEXT in table.column_names:
        require_strings(table, _TEXT, origin.source)
        return _TEXT
    return _only_string_column(table, origin, ignored)


def text_columns(table: Any, columns: Sequence[str], origin: Origin, label: str) -> tuple[str, ...]:
    """Return the columns that a classifier reads: those given, one or two, or that of texts.

    Args:
        label: the column with the classes, which holds no text.

    Raises:
        DataError: a column is missing or does not hold strings. ConfigError: more than two.
    """
    if len(columns) > 2:
        raise ConfigError(
            f"{origin.columns} is {list(columns)}; give one column of text, or two for pairs of"
            " texts"
        )
    require_labels(table, label, origin)
    for column in columns:
        require_strings(table, column, origin.source)
    return tuple(columns) or (text_column(table, origin, (label,)),)


def media_column(table: Any, columns: Sequence[str], origin: Origin, medium: str = "images") -> str:
    """Return the column of images or audio: the one given, the usual one, or the first one.

    Raises:
        DataError: it is missing, or holds none. ConfigError: more than one is given.
    """
    if len(columns) > 1:
        raise ConfigError(f"{origin.columns} is {list(columns)}; {medium} are in one column")
    kind, default = _MEDIA[medium]
    media_columns = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    if columns:
        column = columns[0]
    elif default in media_columns or not media_columns:
        column = default
    else:
        column = media_columns[0]
    require_column(table, column, origin.source)
    if column not in media_columns:
        raise DataError(
            f"column {column!r} of {origin.source!r} holds no {medium}; name another with"
            f" {origin.columns}, or give a folder of {medium}"
        )
    return column


def string_columns(table: Any) -> list[str]:
    """Return the names of the columns of strings."""
    return [name for name, feature in table.features.items() if _is_string(feature)]


def require_strings(table: Any, column: str, source: str | Path) -> None:
    """Raise a DataError unless the table has the column, and it holds strings."""
    require_column(table, column, source)
    if not _is_string(table.features[column]):
        raise DataError(
            f"column {column!r} of {str(source)!r} does not hold strings{_instead(table, column)};"
            f" columns that do: {listed(string_columns(table))}"
        )


def require_column(table: Any, column: str, source: str | Path) -> None:
    """Raise a DataError unless the table has the column."""
    if column not in table.column_names:
        raise DataError(
            f"{str(source)!r} has no column {column!r}; it has {listed(table.column_names)}"
        )


def require_labels(table: Any, column: str, origin: Origin) -> None:
    """Raise a DataError unless the table has the column of classes."""
    if column not in table.column_names:
        raise DataError(
            f"{origin.source!r} has no column {column!r} with the classes; it has"
            f" {listed(table.column_names)}: name the right one with {origin.labels}"
        )


@dataclass(frozen=True)
class _Whole:
    """Tells whether a row has an answer or a text; a class, so that `datasets` can hash it."""

    layout: Layout

    def __call__(self, row: dict[str, Any]) -> bool:
        value = row[self.layout.columns[-1]]
        return bool(value.strip() if isinstance(value, str) else value)


def _answers_as_text(table: Any, columns: Sequence[str]) -> Any:
    """Return the table with text in place of answers that are numbers, such as "2" for 2.

    Answers are in the last of the two or three columns that are named, or, where none are and no
    column has what else is recognized, in those that go with prompts of text.
    """
    if columns:
        answers = [columns[-1]] if len(columns) in (2, 3) else []
    elif _fitting(table):
        answers = []
    else:
        strings, pairs = string_columns(table), (*_PAIRS, (_INSTRUCTION[0], _INSTRUCTION[-1]))
        answers = [answer for prompt, answer in pairs if prompt in strings]
    numbers = [name for name in answers if _is_number(table.features.get(name))]
    if not numbers:
        return table
    features = table.features | {name: datasets.Value("string") for name in numbers}
    return table.cast(datasets.Features(features), keep_in_memory=True)


def _named(table: Any, columns: Sequence[str], origin: Origin) -> Layout:
    """Return the layout of the columns that the user names."""
    if len(columns) > 3:
        raise ConfigError(
            f"{origin.columns} names {len(columns)} columns; name one of chats or texts, the"
            " prompt's and the completion's, or those of instruction, input and output"
        )
    for column in columns:
        require_column(table, column, origin.source)
        _require_one_type(table, column, origin)
    if len(columns) <= 2 and all(_is_chat(table, column) for column in columns):
        return Layout("chat", tuple(columns))
    for column in columns:
        require_strings(table, column, origin.source)
    kinds: tuple[Kind, ...] = ("text", "completion", "instruction")
    return Layout(kinds[len(columns) - 1], tuple(columns))


def _recognized(table: Any, origin: Origin, ignored: Sequence[str]) -> Layout:
    """Return the first layout that the columns fit. DataError where there is none."""
    for column in (*_CHAT_COLUMNS, _TEXT):
        if column in table.column_names:
            _require_one_type(table, column, origin)
    layouts = _fitting(table)
    if layouts:
        return layouts[0]
    if set(table.column_names) >= _PREFERENCE:
        raise DataError(
            f"{origin.source!r} holds preferences (chosen and rejected); name the columns of one of"
            f" the two with {origin.columns}, such as prompt,chosen, or in Python call"
            " evatune.initialize(trainer) with TRL's DPOTrainer"
        )
    for columns in (*_PAIRS, (_INSTRUCTION[0], _INSTRUCTION[-1])):
        if set(columns) <= set(table.column_names):  # recognized by name, but of another type
            for column in columns:
                require_strings(table, column, origin.source)
    return Layout("text", (text_column(table, origin, ignored),))


def _fitting(table: Any) -> list[Layout]:
    """Return the layouts whose columns a table has, by their names or types."""
    strings = set(string_columns(table))
    chats = [name for name in table.column_names if _is_chat(table, name)]
    alone = [name for name in chats if name not in {*_PREFERENCE, *sum(_PAIRS, ())}]
    ordered = sorted(alone, key=lambda name: name not in _CHAT_COLUMNS)
    layouts = [Layout("chat", (name,)) for name in ordered]
    for pair in _PAIRS:
        if strings.issuperset(pair):
            layouts.append(Layout("completion", pair))
        elif set(chats).issuperset(pair):
            layouts.append(Layout("chat", pair))
    instruction, given, output = _INSTRUCTION
    if {instruction, output} <= strings:
        has_input = given in strings
        layouts.append(Layout("instruction", _INSTRUCTION if has_input else (instruction, output)))
    if _TEXT in strings:
        layouts.append(Layout("text", (_TEXT,)))
    return layouts


def _require_one_shape(table: Any, layout: Layout, columns: Sequence[str], origin: Origin) -> None:
    """Raise a DataError for rows with nothing in these columns, but a record of another kind."""
    others = [] if columns else [other for other in _fitting(table) if other != layout]
    for other in others:
        column, other_column = layout.columns[-1], other.columns[-1]
        if column == other_column:
            continue
        mixed = _count(table, column, other_column)
        if mixed:
            raise DataError(
                f"{origin.source!r} mixes shapes: {mixed:,} of its {len(table):,} rows hold"
                f" {listed(other.columns)} and no {column}; give each shape a file of its own, or"
                f" say with {origin.columns} which to read"
            )


def _count(table: Any, empty: str, filled: str) -> int:
    """Return how many rows have nothing in the one column and something in the other."""
    total = 0
    for batch in table.select_columns([empty, filled]).with_format("arrow").iter(10_000):
        both = pc.and_(pc.is_null(batch[empty]), pc.is_valid(batch[filled]))
        total += pc.sum(both).as_py() or 0
    return total


def _require_one_type(table: Any, column: str, origin: Origin) -> None:
    """Raise a DataError for a column in which some rows hold text and others lists or objects."""
    if not _is_json(table.features[column]):
        return
    rows: dict[type, int] = {}
    for number, value in enumerate(table[column], 1):
        if value is not None:
            rows.setdefault(type(value), number)
    if len(rows) > 1:
        kinds = " and ".join(f"{json_name(kind)} in row {number}" for kind, number in rows.items())
        raise DataError(
            f"{origin.source!r} mixes shapes: column {column!r} holds {kinds}; give all rows the"
            " same shape, or each shape a file of its own"
        )


def _only_string_column(table: Any, origin: Origin, ignored: Sequence[str]) -> str:
    names = [name for name in string_columns(table) if name not in ignored]
    if len(names) == 1:
        return names[0]
    if not names:
        raise DataError(
            f"none of the columns of {origin.source!r} ({listed(table.column_names)}) holds texts;"
            " give data with a column 'text', with chats (messages), or with prompts and"
            " completions"
        )
    has_header = kind_of(Path(origin.source)) in ("csv", "tsv")
    header = "; the first line of such a file must name its columns" if has_header else ""
    raise DataError(
        f"{origin.source!r} has no column 'text' and {len(names)} columns of strings"
        f" ({listed(names)}); say which with {origin.columns}, two of them for prompt and"
        f" completion{header}"
    )


def _instead(table: Any, column: str) -> str:
    return ", but chats" if _is_chat(table, column) else ""


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _is_number(feature: Any) -> bool:
    """Return whether a column holds numbers that are no classes."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "float")
    )


def _is_json(feature: Any) -> bool:
    """Return whether `datasets` found values in a column that are of no one type."""
    return type(feature).__name__ == "Json"


def _is_chat(table: Any, column: str) -> bool:
    """Return whether a column holds lists of messages, by its type or by its first entry."""
    feature = table.features[column]
    message = _entry_type(feature)
    if _is_json(feature) or _is_json(message):
        first = next((value for value in table[column] if value), None)
        message = first[0] if isinstance(first, list) else None
    return isinstance(message, dict) and any(keys <= set(message) for keys in _CHAT_KEYS)


def _entry_type(feature: Any) -> Any:
    """Return the type of a list's entries, in either of the ways in which `datasets` says it."""
    if isinstance(feature, list) and feature:
        return feature[0]
    return getattr(feature, "feature", None)
