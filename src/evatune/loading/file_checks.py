"""Checks of what the readers of `datasets` must not see: other encodings, JSON without records."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from evatune.errors import DataError

_LONGEST_LINE = 256 << 20  # bytes of a record in JSON Lines
_LARGEST_DOCUMENT = 1 << 30  # bytes of one JSON document, which is read as a whole
_CHUNK = 1 << 20  # bytes
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    type(None): "null",
}


def json_name(kind: type) -> str:
    """Return what JSON calls a value of this type, in words."""
    return _JSON_NAMES.get(kind, "a number")


def require_utf8(path: Path) -> None:
    """Raise a DataError that names the line of the first byte which is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line, error) from None
            line += chunk.count(b"\n")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The last bytes are the beginning of a character; no line ends among them.
        raise _not_utf8(path, line, error) from None


def _not_utf8(path: Path, first_line: int, error: UnicodeDecodeError) -> DataError:
    """Return the error for bytes that begin in `first_line`."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    return DataError(
        f"{str(path)!r} is not UTF-8: line {line} holds the byte 0x{error.object[error.start]:02x}"
        " of another encoding, such as Latin-1 or UTF-16; write the file as UTF-8, for example"
        " with: iconv -f LATIN1 -t UTF-8"
    )


def require_records(path: Path) -> None:
    """Raise a DataError unless a file holds JSON objects: one a line, or a document of them."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                raise DataError(
                    f"line {number} of {str(path)!r} is longer than {_LONGEST_LINE >> 20} MiB;"
                    " write one record a line"
                )
            try:
                record = _parse(path, number, line) if line.strip() else {}
            except json.JSONDecodeError as error:
                if _is_document(path):
                    return
                raise DataError(
                    f"line {number} of {str(path)!r} is not JSON: {error}; mend it, or take it out"
                ) from error
            if isinstance(record, list) and number == 1 and _is_document(path):
                return
            if not isinstance(record, dict):
                raise _not_a_record(path, f"line {number}", record)


def _is_document(path: Path) -> bool:
    """Return whether a file is one JSON document.

    Raises DataError where it is one, and none of records or of texts.
    """
    if path.stat().st_size > _LARGEST_DOCUMENT:
        return False
    try:
        document = _parse(path, 1, path.read_bytes())
    except json.JSONDecodeError:
        return False
    records = document if isinstance(document, list) else [document]
    if not records:
        raise DataError(f"{str(path)!r} is empty; give data with at least one text")
    holds_texts = isinstance(document, list) and isinstance(records[0], str)
    expected = str if holds_texts else dict
    for number, record in enumerate(records, 1):
        if not isinstance(record, expected):
            raise _not_a_record(path, f"entry {number}", record)
    return True


def _parse(path: Path, line: int, raw: bytes) -> Any:
    """Return the JSON value in `raw`, which begins in this line of the file."""
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        return json.loads(text, parse_int=float)  # integers of any number of digits
    except UnicodeDecodeError as error:
        raise _not_utf8(path, line, error) from None
    except RecursionError:
        raise DataError(
            f"line {line} of {str(path)!r} is nested too deeply; give records of plain values"
        ) from None


def _not_a_record(path: Path, where: str, value: Any) -> DataError:
    return DataError(
        f"{where} of {str(path)!r} is {json_name(type(value))}, which is no record; write each as"
        ' an object, such as {"text": "…"}'
    )
