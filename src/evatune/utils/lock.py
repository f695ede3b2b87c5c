"""A folder for one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from evatune.errors import ConfigError
from evatune.utils.atomic import writing

_NAME = ".evatune.lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process alone; if nothing was put into it, it goes again.

    The lock is the system's: it ends with the process that holds it, however that ends.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
    """
    made = not folder.exists()
    lock = FileLock(folder / _NAME)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{str(folder)!r} is in use by another evatune train, compare or evaluate; wait"
                " until that has ended, or name another --out"
            ) from None
    try:
        yield
    finally:
        # While it is held: who opens the file at this moment will see that it has gone.
        (folder / _NAME).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):
                folder.rmdir()
