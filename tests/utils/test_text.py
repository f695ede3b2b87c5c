"""Text for messages."""

from __future__ import annotations

from typing import Any

import pytest

from evatune.utils.text import ABSENT, duration, first_difference, folded, one_line, shortened, size


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")],
)
def test_more_names_than_the_limit_are_counted(names: list[str], text: str) -> None:
    assert shortened(names, 2) == text


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ({"a": 1, "b": {"c": [1]}}, {"b": {"c": [1]}, "a": 1}, None),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("b", 2, 3)),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, ("a b c", 1, 2)),
        ({"a": {"b": None}}, {"a": {}}, ("a b", None, ABSENT)),
        ({}, {"a": None}, ("a", ABSENT, None)),
        ({"a": {"b": 1}}, {"a": 1}, ("a", {"b": 1}, 1)),
        (1, 2, ("", 1, 2)),
    ],
)
def test_the_first_difference_is_named_by_its_keys(
    first: Any, second: Any, difference: Any
) -> None:
    assert first_difference(first, second) == difference


def test_errors_are_told_in_one_line_and_never_in_none() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("long"), most=2) == "lo"
    assert one_line(TimeoutError()) == "TimeoutError"


def test_a_line_is_folded_on_a_terminal_and_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert folded("a line of several words", "  ") == "a line of several words"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "12")
    assert folded("a line of several words", "  ") == "a line of\n  several\n  words"


def test_durations_and_sizes_are_short() -> None:
    assert [duration(seconds) for seconds in (0.2, 9.4, 99, 240, 9000, 1e9)] == (
        ["0 s", "9 s", "99 s", "4 min", "2.5 h", "11,574 days"]
    )
    assert [size(count) for count in (0, 900, 35e6, 999.6e3, 1.24e9)] == (
        ["0 B", "900 B", "35 MB", "1 MB", "1.2 GB"]
    )
