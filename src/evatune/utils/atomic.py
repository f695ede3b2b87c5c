"""Single files that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evatune.errors import ConfigError
from evatune.utils.names import resolved
from evatune.utils.stage import staged
from evatune.utils.system import finish, sync

NAME_ANOTHER = "name another with --out"
MAKE_ROOM = "make room or rights there, or name another place"
_TIMEOUT = 60.0  # seconds that the writing of one file waits for another process that writes it


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or absent."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty file that replaces `path` when the block ends well, and vanishes otherwise.

    A link at `path` is replaced itself, not what it points to.
    """
    path = resolved(path.parent) / path.name
    with writing(path, MAKE_ROOM), staged(path, _TIMEOUT) as stage:
        stage.making.touch()
        yield stage.making
        finish(stage.making)
        stage.making.replace(path)
        sync(path.parent)


@contextmanager
def writing(path: str | Path, advice: str = NAME_ANOTHER) -> Iterator[None]:
    """Turn what libraries raise when writing fails into a ConfigError that names `path`."""
    try:
        yield
    except Exception as error:
        reason = _why_unwritten(error)
        if reason is None:
            raise
        raise ConfigError(f"output {str(path)!r} cannot be written ({reason}); {advice}") from error


def _why_unwritten(error: Exception) -> str | None:
    """Return the system's reason; None for an error that is not about writing."""
    # An error that `writing` has turned already, around a file of the same output.
    if isinstance(error, ConfigError) and isinstance(error.__cause__, Exception):
        return _why_unwritten(error.__cause__)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ValueError) and "null byte" in str(error):
        return "its name has a null byte"
    # safetensors and tokenizers raise errors of their own kinds, PyTorch a RuntimeError without the
    # reason.
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code is not None:
        return os.strerror(int(code[1]))
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return "PyTorch could not write; is the disk full?"
    return None
