"""What is wrong with a file, in words short enough for one line."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from evatune.errors import EvatuneError, RecordError

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlong = 40
_repr.maxdict = _repr.maxlist = 3
_repr.maxlevel = 2


class FormatError(ValueError):
    """A fault of a file, as the second half of a sentence: "is no JSON: …"."""


def short_repr(value: object) -> str:
    """Return a value that came from a file as a short text in one line."""
    return _repr.repr(value)


@contextmanager
def raise_with_path(
    path: str | os.PathLike[str], advice: str, error: type[EvatuneError] = RecordError
) -> Iterator[None]:
    """Raise `error`, with the file's name and what to do, for any `FormatError` in the block."""
    try:
        yield
    except FormatError as fault:
        raise error(f"{str(path)!r} {fault}; {advice}") from fault
