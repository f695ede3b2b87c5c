"""Sentences from the errors of other libraries."""

from __future__ import annotations

from evatune.utils.extras import extras
from evatune.utils.text import first_line

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
