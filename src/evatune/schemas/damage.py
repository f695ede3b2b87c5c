"""Damage: what is wrong with a file, in words short enough for one line."""

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


class Damage(ValueError):
    """A fault of a file, as the second half of a sentence: "is no JSON: …"."""


def brief(value: object) -> str:
    """Return a value that came from a file as a short text in one line."""
    return _repr.repr(value)


@contextmanager
def naming_file(
    path: str | os.PathLike[str], advice: str, error: type[EvatuneError] = RecordError
) -> Iterator[None]:
    """Raise `error`, with the file's name and what to do, for any `Damage` in the block."""
    try:
        yield
    except Damage as damage:
        raise error(f"{str(path)!r} {damage}; {advice}") from damage
