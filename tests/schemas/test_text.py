"""JSON and YAML are read within bounds."""

from __future__ import annotations

import time

import pytest

from evatune.schemas import FormatError
from evatune.schemas.text import parse_json, parse_yaml


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "[" * 40 + "]" * 40,
        "1" * 4301,
        "1." + "3" * 5000,
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        "",
        "{",
        "{} {}",
    ],
)
def test_json_without_bounds_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"^holds [^\n]{1,200}$"):
        parse_json(text)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a [*a]",
        "a: !!binary aGk=",
        "a: !!python/object/apply:os.getcwd []",
        "a: 1\na: 2",
        "[" * 10_000,
        "- " * 3000,
        "a: " + "1" * 5000,
        "a: " + "x" * 70_000,
        "1: a",
        "? [a]\n: b",
        "a: 2020-13-45",
        "a: [",
        "--- a\n--- b",
    ],
)
def test_yaml_that_json_could_not_say_is_refused(text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(FormatError, match=r"^(is|holds) [^\n]{1,400}$"):
        parse_yaml(text)
    assert time.monotonic() - begun < 5
