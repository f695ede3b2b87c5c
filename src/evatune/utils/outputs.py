"""Outputs of commands: claimed at the start, whole or absent at the end, and never anybody else's.

What is made comes to its place out of a hidden folder beside it (see `stage.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from evatune.errors import ConfigError
from evatune.utils.atomic import NAME_ANOTHER, writing
from evatune.utils.mark import require_unchanged_folder, write_mark
from evatune.utils.names import as_shown, resolved
from evatune.utils.stage import Stage
from evatune.utils.system import (
    Entries,
    already_exists,
    entries_of,
    exchange,
    finish,
    is_there,
    move_aside,
    rename_to_free_name,
    sync,
)


@dataclass(frozen=True)
class Output:
    """A file or folder that one command has claimed.

    Attributes:
        path: where it goes, without links and "..".
        shown: the same as `as_shown` gives it.
        advice: what to do where it cannot be written.
    """

    path: Path
    shown: Path
    advice: str
    _stage: Stage
    _before: Entries | None

    @contextmanager
    def whole(self) -> Iterator[Path]:
        """Yield an empty file, or folder, that is put in place when the block ends well.

        What was there at the start is replaced. What has come or changed since then is not: ours
        lies beside it then.
        """
        making = self._stage.making
        with writing(self.shown, self.advice):
            yield making
            if making.is_dir():
                write_mark(making)
            finish(making)
            self._stage.note(entries_of(making), self._before)
        try:
            self._put_in_place(making)
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, FileExistsError):
                reason = (
                    "it has come there, or has changed, while evatune worked, and is left alone"
                )
            aside = move_aside(making, self.path, ".new")
            raise ConfigError(
                f"output {str(self.shown)!r} cannot be replaced ({reason}); the new one is"
                f" {str(aside)!r}"
            ) from error
        with writing(self.shown, self.advice):
            sync(self.path.parent)

    def remove(self) -> None:
        """Remove what was there at the start, unless it has changed since."""
        if self._before is not None and entries_of(self.path) == self._before:
            self._stage.note(self._before, entries_of(self._stage.making))
            self.path.rename(self._stage.making)
            self._stage.clear()

    def _put_in_place(self, making: Path) -> None:
        """Raise FileExistsError for what must not be replaced."""
        now = entries_of(self.path)
        if now is None:
            rename_to_free_name(making, self.path)
        elif now != self._before:
            raise already_exists(self.path)
        elif not exchange(making, self.path):
            self._exchange_in_two_steps(making)
        elif entries_of(making) != self._before:  # it changed in that very moment
            exchange(making, self.path)
            raise already_exists(self.path)

    def _exchange_in_two_steps(self, making: Path) -> None:
        if making.is_dir():
            # whoever is killed here, the next command puts it back
            self.path.rename(self._stage.old)
            if entries_of(self._stage.old) != self._before:
                rename_to_free_name(self._stage.old, self.path)
                raise already_exists(self.path)
            rename_to_free_name(making, self.path)
        else:
            making.replace(self.path)


@contextmanager
def claimed_folder(out: str | Path, overwrite: bool) -> Iterator[Output]:
    """Claim the folder `out` for the block, in which `Output.whole` writes it.

    Raises:
        ConfigError: it cannot be written, another command has claimed it, or it exists and must not
            be replaced. Replaced, with `overwrite`, is only a folder that holds what evatune's list
            in it says, and nothing else.
    """

    def require(path: Path, shown: Path) -> None:
        if not overwrite:
            raise ConfigError(
                f"output folder {str(shown)!r} exists; name another with --out, or replace it with"
                " --overwrite"
            )
        if Path.cwd().is_relative_to(path):
            raise ConfigError(
                f"output {str(shown)!r} is the folder you are in; go elsewhere, or name another"
                " with --out"
            )
        require_unchanged_folder(path, shown)

    with _claimed(out, overwrite, Path.mkdir, require, NAME_ANOTHER) as output:
        yield output


@contextmanager
def claimed_file(
    out: str | Path, overwrite: bool, is_ours: Callable[[Path], bool], advice: str = NAME_ANOTHER
) -> Iterator[Output]:
    """Claim the file `out` for the block, in which `Output.whole` writes it.

    Raises:
        ConfigError: it cannot be written, another command has claimed it, or it exists and must not
            be replaced. Replaced, with `overwrite`, is only what `is_ours` accepts.
    """

    def require(path: Path, shown: Path) -> None:
        if path.is_dir():
            raise ConfigError(f"output {str(shown)!r} is a folder; name a file in it, or {advice}")
        if not overwrite:
            raise ConfigError(
                f"output file {str(shown)!r} exists; {advice}, or replace it with --overwrite"
            )
        if not is_ours(path):
            raise ConfigError(
                f"output file {str(shown)!r} exists and was not written by evatune, so it is left"
                f" alone; {advice}"
            )

    with _claimed(out, overwrite, Path.touch, require, advice) as output:
        yield output


def require_apart(out: str | Path, **sources: str | Path | None) -> None:
    """Raise a ConfigError if `out` is, or holds, one of the inputs: adapter=path."""
    path = resolved(out)
    for role, source in sources.items():
        if source is None or not os.path.lexists(source):
            continue
        if resolved(source).is_relative_to(path):
            relation = "is" if resolved(source) == path else "holds"
            raise ConfigError(f"output {str(out)!r} {relation} the {role} itself; {NAME_ANOTHER}")


@contextmanager
def _claimed(
    out: str | Path,
    overwrite: bool,
    make: Callable[[Path], None],
    require: Callable[[Path, Path], None],
    advice: str,
) -> Iterator[Output]:
    path = resolved(out)
    shown = as_shown(out)
    with writing(shown, advice):
        if is_there(path) and not (overwrite and path.name):
            require(path, shown)  # at once, before anything is made
        missing = [parent for parent in path.parents if not parent.exists()]  # innermost first
    try:
        with writing(shown, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            stage = Stage.claimed(path, shown)
        try:
            with writing(shown, advice):
                make(stage.making)
                before = entries_of(path)
                if before is not None:
                    require(path, shown)
            yield Output(path, shown, advice, stage, before)
        finally:
            stage.release()
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
