"""Sentences from the errors of other libraries."""

from __future__ import annotations

import datasets
import pytest

from evatune.loading.error_text import first_line, reason, root_cause

WRAPPER = datasets.exceptions.DatasetGenerationError


def wrapped(error: BaseException, times: int) -> BaseException:
    for _ in range(times):
        wrapper = WRAPPER("An error occurred while generating the dataset")
        wrapper.__cause__ = error
        error = wrapper
    return error


@pytest.mark.parametrize("times", [0, 1, 2])
def test_the_reason_is_what_datasets_wrapped(times: int) -> None:
    cause = ValueError("column text is missing\nin the second file")
    error = wrapped(cause, times)
    assert root_cause(error) is cause
    assert reason(error) == "column text is missing."


def test_a_wrapper_around_nothing_speaks_for_itself() -> None:
    assert reason(WRAPPER("no rows")) == "no rows."


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("out of memory", "out of memory."),
        ("out of memory.", "out of memory."),
        ("did you mean bert?\nor not", "did you mean bert?"),
        ("\n  stop!", "stop!"),
        ("", "OSError."),
        (" \n", "OSError."),
    ],
)
def test_the_first_line_is_one_sentence_whatever_the_error_says(text: str, line: str) -> None:
    assert first_line(OSError(text)) == line
