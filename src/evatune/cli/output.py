"""Output folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evatune.errors import ConfigError

_MARK = "calibration.safetensors"


def require_free(out: Path, overwrite: bool) -> None:
    """Raise a ConfigError unless `out` can be written, or replaced when `overwrite` says so."""
    if not out.exists():
        return
    if not overwrite:
        raise ConfigError(f"output folder {str(out)!r} exists; name another with --out, or replace it with --overwrite")
    if not (out / _MARK).is_file():
        raise ConfigError(
            f"output {str(out)!r} exists and was not written by evatune (it holds no {_MARK}), so --overwrite leaves it "
            "alone; name another with --out"
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and vanishes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if out.exists():
            old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
            out.rename(old / "old")
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
