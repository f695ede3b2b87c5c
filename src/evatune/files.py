"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from evatune.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name beside `path`, then rename."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path` that takes its place when the block ends well, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_free(out: Path, overwrite: bool, *, mark: str, ours: Collection[str]) -> None:
    """Raise a ConfigError unless `out` can be written, or replaced when `overwrite` says so.

    Replaced is only a folder that holds the file `mark`, and beside it nothing but entries named in `ours`.
    """
    if not os.path.lexists(out):
        _require_writable(out)
        return
    if not overwrite:
        raise ConfigError(f"output folder {str(out)!r} exists; name another with --out, or replace it with --overwrite")
    if not (out / mark).is_file():
        raise ConfigError(
            f"output {str(out)!r} exists and was not written by evatune (it holds no {mark}), so --overwrite leaves it "
            "alone; name another with --out"
        )
    foreign = sorted({path.name for path in out.iterdir()} - {mark, *ours})
    if foreign:
        raise ConfigError(
            f"output {str(out)!r} holds what evatune did not write ({', '.join(foreign[:3])}{' …' if foreign[3:] else ''}), "
            "so --overwrite leaves it alone; move that away, or name another folder with --out"
        )
    if Path.cwd().is_relative_to(out.resolve()):
        raise ConfigError(f"output {str(out)!r} is the folder you are in; go elsewhere, or name another with --out")
    _require_writable(out)


def require_free_file(out: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise a ConfigError unless the file `out` can be written, or replaced when `overwrite` says so and it is ours."""
    if out.is_dir():
        raise ConfigError(f"output {str(out)!r} is a folder; name a file in it with --out")
    if os.path.lexists(out):
        if not overwrite:
            raise ConfigError(f"output file {str(out)!r} exists; name another with --out, or replace it with --overwrite")
        if not is_ours(out):
            raise ConfigError(
                f"output file {str(out)!r} exists and was not written by evatune, so --overwrite leaves it alone; name "
                "another with --out"
            )
    _require_writable(out)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and vanishes otherwise."""
    out = out.resolve()
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        yield temporary
        _open_to_readers(temporary)
        _put_in_place(temporary, out)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.exists():
                parent.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(
                f"output {str(out)!r} cannot be written ({error.strerror or error}); name another with --out"
            ) from error
        raise


def _require_writable(out: Path) -> None:
    """Before the work, not after it: the nearest folder that exists must take new entries."""
    above = next(parent for parent in out.resolve().parents if os.path.lexists(parent))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output {str(out)!r} cannot be written: {str(above)!r} is not a folder that you may write to; name another "
            "with --out"
        )


def _open_to_readers(folder: Path) -> None:
    """Temporary folders and safetensors' files are for their owner alone; results get the usual permissions."""
    mask = umask()
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _put_in_place(temporary: Path, out: Path) -> None:
    if not out.exists():
        temporary.rename(out)
        return
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        out.rename(aside / "old")
        temporary.rename(out)
    except BaseException:
        if (aside / "old").exists() and not out.exists():
            (aside / "old").rename(out)
        raise
    finally:
        if out.exists():  # else what is aside is all there is left of the earlier results
            shutil.rmtree(aside, ignore_errors=True)
