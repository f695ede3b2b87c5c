"""JSON and YAML within bounds: of size, nesting and digits, and without keys that come twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from evatune.schemas.format_error import FormatError, short_repr
from evatune.utils.text import one_line

_T = TypeVar("_T")

_MAX_NESTING = 32  # what we write has at most 5 levels
_MAX_DIGITS = 40  # of a number as text; 2**64 has 20, and a float no more than 24
_TEXT_BYTES = 64 << 20
_YAML_BYTES = 64 << 10  # the pure Python parser reads about 100 kB a second


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file in UTF-8 of a bounded size; `errors` as for `bytes.decode`."""
    require_file(path)
    with readable():
        size = path.stat().st_size
        if size > _TEXT_BYTES:
            raise FormatError(f"has {size} bytes, and {_TEXT_BYTES} are read at most")
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise FormatError(f"is not text in UTF-8 (byte {error.start} is not)") from error


def require_file(path: Path) -> None:
    """Raise FormatError unless there is a file at a path, which the system may not even look at."""
    with readable():
        is_file = path.is_file()
    if not is_file:
        raise FormatError("is not a file")


@contextmanager
def readable() -> Iterator[None]:
    """Raise FormatError for what the system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror or error})") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; NaN and Infinity are read, and left to the schema."""
    if len(text) > _TEXT_BYTES:
        raise FormatError(
            f"holds JSON of {len(text)} characters, and {_TEXT_BYTES} are read at most"
        )
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_whole,
            parse_float=_real,
        )
    except RecursionError:
        raise FormatError(f"holds JSON that is nested deeper than {_MAX_NESTING} levels") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"holds no whole JSON ({error})") from error
    _require_shallow(value, "JSON")
    return value


def validate_json(kind: type[_T], text: str) -> _T:
    """Return a JSON text as the schema `kind` describes it."""
    parse_json(text)  # bounds and keys, which pydantic does not look at
    with fitting():
        return TypeAdapter(kind).validate_json(text)


@contextmanager
def fitting() -> Iterator[None]:
    """Raise FormatError for what pydantic refuses in the block."""
    try:
        yield
    except ValidationError as error:
        raise FormatError(f"does not fit: {explained(error)}") from error


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text without tags, anchors and aliases."""
    if len(text.encode("utf-8", "surrogatepass")) > _YAML_BYTES:
        raise FormatError(f"holds more than {_YAML_BYTES >> 10} kB of YAML")
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise FormatError(f"is not YAML: {one_line(error)}") from error
    except FormatError:
        raise
    except ValueError as error:  # such as February 30
        raise FormatError(f"holds a value that YAML has no meaning for ({error})") from error


def explained(error: ValidationError) -> str:
    """Return the first mistake that pydantic found, and how many more there are."""
    first, *others = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    more = f", and {len(others)} more" if others else ""
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "missing_argument"):
        return f"key {short_repr(key)} is missing{more}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"key {short_repr(key)} is unknown{more}"
    if not key:
        return f"{reason}{more}"
    return (
        f"{short_repr(key)} is {short_repr(first['input'])}: {reason[:1].lower()}{reason[1:]}{more}"
    )


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise FormatError(f"holds the key {short_repr(key)} twice")
        mapping[key] = value
    return mapping


def _whole(text: str) -> int:
    _require_few_digits(text)
    return int(text)


def _real(text: str) -> float:
    _require_few_digits(text)
    return float(text)


def _require_few_digits(text: str) -> None:
    if len(text) > _MAX_DIGITS:
        raise FormatError(
            f"holds a number of {len(text)} characters, and {_MAX_DIGITS} are the most"
        )


def _require_shallow(value: Any, what: str) -> None:
    # Level by level, as a recursion would end in the very error that this prevents.
    level = [value]
    for _ in range(_MAX_NESTING + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise FormatError(f"holds {what} that is nested deeper than {_MAX_NESTING} levels")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML as JSON has it: aliases make bombs and loops, tags other kinds of values."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nesting = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise FormatError(
                f"holds an anchor or alias of YAML ({short_repr(event.anchor)}); write it out"
            )
        if event.tag is not None:
            raise FormatError(f"holds a tag of YAML ({short_repr(event.tag)}); write plain values")
        if self._nesting > _MAX_NESTING:
            raise FormatError(f"holds YAML that is nested deeper than {_MAX_NESTING} levels")
        self._nesting += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._nesting -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise FormatError(f"holds the key {short_repr(key)}, which is not text")
            if key in mapping:
                raise FormatError(f"holds the key {short_repr(key)} twice")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if node.tag.endswith((":int", ":float")):
            _require_few_digits(value)
        return value
