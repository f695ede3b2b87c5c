"""The stage of an output: a hidden folder beside `NAME`, `.NAME.evatune`, where it is made.

    lock       held while a command works on NAME; the system releases it when the command dies
    mark       says that the folder is ours
    making     what is being written
    journal    what may be deleted here: what was written, and what it replaces
    old        what is being replaced, only where two folders cannot be exchanged in one step
    .tmp…      half a file, of a library that renames it when it is whole (safetensors)

A command that is killed leaves its stage, and the next one on the same NAME clears it, or repairs
from it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evatune.errors import ConfigError
from evatune.utils.names import beside
from evatune.utils.system import (
    Entries,
    entries_of,
    move_aside,
    remove,
    remove_listed,
    rename_to_free_name,
    sync,
)

_STAGE_MARK = b'{"format": "evatune-stage-1"}\n'
_STAGE_FILES = frozenset({"lock", "mark", "journal", "making", "old"})
_HALF_FILES = ".tmp*"
_TRIES, _PAUSE = 25, 0.02  # to come upon a stage that nobody makes or removes at that moment


@dataclass(frozen=True)
class Stage:
    """The hidden folder beside `path`, locked."""

    path: Path
    folder: Path
    lock: Any

    @property
    def making(self) -> Path:
        return self.folder / "making"

    @property
    def old(self) -> Path:
        return self.folder / "old"

    @classmethod
    def claimed(cls, path: Path, shown: Path, timeout: float = 0.0) -> Stage:
        """Lock the stage of `path`, after clearing what a killed command left in it.

        Raises:
            ConfigError: another process holds it for longer than `timeout` seconds, or it is not
                ours.
        """
        folder = beside(path, ".", ".evatune")
        lock = FileLock(folder / "lock", timeout=timeout)
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            if _is_stage(folder, locked=False):
                try:
                    lock.acquire()
                except Timeout:
                    raise ConfigError(
                        f"another evatune command is writing {str(shown)!r}; wait for its end, or"
                        " name another output"
                    ) from None
                except FileNotFoundError:  # whoever held it has ended and removed it
                    continue
                stage = cls(path, folder, lock)
                try:
                    if _is_stage(folder, locked=True):
                        (folder / "mark").write_bytes(_STAGE_MARK)
                        stage.clear()
                        return stage
                except BaseException:
                    stage.release()
                    raise
                lock.release()
            time.sleep(_PAUSE)
        raise ConfigError(
            f"{str(folder)!r} is in the way: evatune makes {str(shown)!r} there, but did not write"
            " what it holds; move it away, or name another output"
        )

    def note(self, *ours: Entries | None) -> None:
        """Write the journal of what may be deleted here, before files change places."""
        journal = self.folder / "journal"
        journal.write_text(
            json.dumps([entries for entries in ours if entries is not None]), encoding="utf-8"
        )
        sync(journal)
        sync(self.folder)

    def clear(self) -> None:
        """Remove what is ours of what a command left here, and put back what it had taken away."""
        noted = self._noted()
        if os.path.lexists(self.old) and entries_of(self.path) is None:
            rename_to_free_name(self.old, self.path)
        if os.path.lexists(self.old) and (not noted or entries_of(self.path) != noted[0]):
            self._move_aside(self.old)
        for left in (self.making, self.old):
            if noted is None:
                remove(left)  # it was never in another place
            elif not remove_listed(left, noted):
                self._move_aside(left)
        for half in self.folder.glob(_HALF_FILES):
            half.unlink(missing_ok=True)
        (self.folder / "journal").unlink(missing_ok=True)

    def release(self) -> None:
        """Clear and remove the stage, then let others have it."""
        try:
            self.clear()
            if self.folder.exists() and set(os.listdir(self.folder)) <= {"mark", "lock"}:
                (self.folder / "mark").unlink(missing_ok=True)
                (self.folder / "lock").unlink(missing_ok=True)
                self.folder.rmdir()
        finally:
            self.lock.release()

    def _noted(self) -> list[Entries] | None:
        """Return the journal; None where nothing can have been exchanged yet.

        Then there is no journal, or half of one.
        """
        try:
            noted: list[Entries] = json.loads((self.folder / "journal").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return noted

    def _move_aside(self, left: Path) -> None:
        aside = move_aside(left, self.path, ".kept")
        raise ConfigError(
            f"what was in {str(self.path)!r} has changed while evatune replaced it, and is now"
            f" {str(aside)!r}; look at it, then run the command again"
        )


@contextmanager
def staged(path: Path, timeout: float) -> Iterator[Stage]:
    """Claim the stage of `path` for the block."""
    stage = Stage.claimed(path, path, timeout)
    try:
        yield stage
    finally:
        stage.release()


def _is_stage(folder: Path, *, locked: bool) -> bool:
    """Return whether the folder is a stage of ours, by its mark.

    One without a whole mark is ours if it holds no more than a command that was killed at its very
    start can have left.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        names = set(os.listdir(folder))
        mark = (folder / "mark").read_bytes() if "mark" in names else b""
        lock = (folder / "lock").lstat().st_size if "lock" in names and not locked else 0
    except OSError:  # it went meanwhile
        return False
    if mark == _STAGE_MARK:
        return names - set(fnmatch.filter(names, _HALF_FILES)) <= _STAGE_FILES
    return names <= {"lock", "mark"} and _STAGE_MARK.startswith(mark) and lock == 0
