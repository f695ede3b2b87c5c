"""Sentences from the errors of other libraries."""

from __future__ import annotations

from evatune.utils.extras import extras

with extras(__name__):
    import datasets


def reason(error: BaseException) -> str:
    """Return the first line of the root cause.

    `datasets` itself says no more than that an error occurred.
    """
    return first_line(root_cause(error))


def root_cause(error: BaseException) -> BaseException:
    """Return the error that `datasets` wrapped."""
    wrapper = datasets.exceptions.DatasetGenerationError
    while isinstance(error, wrapper) and error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return an error's first line as a sentence."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."
