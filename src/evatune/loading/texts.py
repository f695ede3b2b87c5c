"""Texts from a hub or from files, and batches of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError, DataError
from evatune.loading.data_files import kind_of, read_data_files
from evatune.loading.hub import reading, require_path
from evatune.utils.extras import extras

with extras(__name__):
    import datasets

CHARACTERS_PER_TOKEN = 64  # many more than texts have
_NAMES_SHOWN, _NAME_LENGTH = 8, 40
_CHAT_KEYS = ({"role", "content"}, {"from", "value"})  # of a message, as trainers take them


def load_texts(source: str | Path, column: str | None = None, *, split: str = "train") -> Any:
    """Return texts as a `datasets.Dataset` with one column, "text".

    Args:
        source: a hub id; a folder that `datasets` saved, or one with text (a document per file),
            JSON, CSV or Parquet files anywhere below it; or one such file (text: a document per
            line).
        column: which column holds the text; default "text", else the only column of strings.
        split: of a hub data set, or of a saved one with splits.

    Raises:
        DataError: nothing there, no such column, or no text.
    """
    require_path(source, "data")
    path = Path(source)
    with reading(source, "data", "a folder or file of text, JSON Lines, CSV or Parquet"):
        if path.exists():
            data = read_data_files(path, split)
        else:
            data = datasets.load_dataset(str(source), split=split)
        column = _text_column(data, column, source)
        data = data.select_columns([column])
        if column != "text":
            data = data.rename_column(column, "text")
        # In memory, eight bytes a text: else a folder that `datasets` saved would get cache files
        # of ours.
        data = data.filter(_has_text, keep_in_memory=True)
    if len(data) == 0:
        raise DataError(
            f"{str(source)!r} holds no text: every entry of column {column!r} is empty; give data"
            " with text in it"
        )
    return data


def _has_text(row: dict[str, Any]) -> bool:
    text = row["text"]
    return bool(text and text.strip())


def _text_column(data: Any, column: str | None, source: str | Path) -> str:
    """Return the column to read: the one asked for, "text", or the only one of strings."""
    string_columns = [name for name, feature in data.features.items() if _is_string(feature)]
    if column is None and "text" in data.column_names:
        column = "text"
    if column is None:
        return _only_string_column(data, string_columns, source)
    if column not in data.column_names:
        raise DataError(
            f"{str(source)!r} has no column {column!r}; it has {_listed(data.column_names)}"
        )
    require_no_chat(data, column, source)
    if column not in string_columns:
        raise DataError(
            f"column {column!r} of {str(source)!r} does not hold strings; columns that do:"
            f" {_listed(string_columns)}"
        )
    return column


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _only_string_column(data: Any, string_columns: list[str], source: str | Path) -> str:
    if len(string_columns) == 1:
        return string_columns[0]
    if not string_columns:
        for name in data.column_names:
            require_no_chat(data, name, source)
        raise DataError(
            f"{str(source)!r} has no column 'text' and 0 columns of strings (it has"
            f" {_listed(data.column_names)}); give data whose texts are strings"
        )
    has_header = kind_of(Path(source)) in ("csv", "tsv")
    header = "; the first line of such a file must name its columns" if has_header else ""
    raise DataError(
        f"{str(source)!r} has no column 'text' and {len(string_columns)} columns of strings"
        f" ({_listed(string_columns)}); say which with --text-column{header}"
    )


def require_no_chat(data: Any, column: str, source: str | Path) -> None:
    """Raise a DataError for a column of chats: lists of messages, in a form that trainers take."""
    message = _entry_type(data.features[column])
    if not isinstance(message, dict):
        return
    if any(keys <= set(message) for keys in _CHAT_KEYS):
        raise DataError(
            f"column {column!r} of {str(source)!r} holds chats, which are not read as they are;"
            " make a text of each by the model's template,"
            f" tokenizer.apply_chat_template(row[{column!r}], tokenize=False), and save those as"
            " 'text'"
        )


def _entry_type(feature: Any) -> Any:
    """Return the type of a list's entries, in either of the ways in which `datasets` says it."""
    if isinstance(feature, list) and feature:
        return feature[0]
    return getattr(feature, "feature", None)


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    shown = []
    for name in names[:_NAMES_SHOWN]:
        shown.append(name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…")
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(shown) + more


def truncate_texts(texts: Iterable[str], tokenizer: Any, tokens: int) -> list[str]:
    """Return the texts without what lies far beyond so many tokens.

    Tokenizers read a text to its end before they cut it.
    """
    longest = tokens * CHARACTERS_PER_TOKEN
    if tokenizer.truncation_side == "left":
        return [text[-longest:] for text in texts]
    return [text[:longest] for text in texts]


@dataclass(frozen=True)
class TextBatches:
    """Tokenized batches of shuffled texts; iterable any number of times, the same each time.

    Attributes:
        texts: a `datasets.Dataset` with a column "text".
        labels: add those of a language model, each token's own id, and -100 for padding.
    """

    tokenizer: Any
    texts: Any
    batch_size: int
    max_length: int
    seed: int
    labels: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"seed is {self.seed}; it must be at least 0 and below 2 to the power 63"
            )

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        shuffled = self.texts.shuffle(seed=self.seed, keep_in_memory=True)
        limit = min(self.max_length, self.tokenizer.model_max_length)
        for start in range(0, len(shuffled), self.batch_size):
            texts = shuffled[start : start + self.batch_size]["text"]
            texts = truncate_texts(texts, self.tokenizer, limit)
            batch = self.tokenizer(
                texts, truncation=True, max_length=limit, padding=True, return_tensors="pt"
            )
            if self.labels:
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            yield batch
