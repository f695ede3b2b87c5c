"""Files and folders that are whole or absent, and never anybody else's.

What is made comes to its place out of a hidden folder beside it, `.NAME.evatune`, the stage:

    lock       held while a command works on NAME; the system releases it when the command dies
    mark       says that the folder is ours
    making     what is being written
    journal    what may be deleted here: what was written, and what it replaces
    old        what is being replaced, only where two folders cannot be exchanged in one step

A command that is killed leaves its stage, and the next one on the same NAME clears it, or repairs
from it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evatune.errors import ConfigError
from evatune.version import __version__

MARK = "evatune.json"  # lists what a folder of ours holds


_FORMAT = "evatune-output-1"


_STAGE_MARK = b'{"format": "evatune-stage-1"}\n'


_STAGE_FILES = frozenset({"lock", "mark", "journal", "making", "old"})


_ADVICE = "name another with --out"


_ROOM = "make room or rights there, or name another place"


_NAME_BYTES = 255  # of a name, on nearly every file system


_PART_BYTES = 100  # of a name's part that comes from a recipe


_PATIENCE = 60.0  # seconds that the writing of one file waits for another process that writes it


_TRIES, _PAUSE = 25, 0.02  # to come upon a stage that nobody makes or removes at that moment


_ASIDE = 100  # results that lie aside, at most


_NOREPLACE, _EXCHANGE = 1, 2  # of renameat2


_HERE = -100  # AT_FDCWD


# Path below a folder ("" for itself) → inode, and for files size and time of change.
Entries = dict[str, list[int]]


# -- names -----------------------------------------------------------------------------------------


def resolved(path: str | Path) -> Path:
    """Return where `path` leads, absolute and without links or "..", so that one place is both
    judged and written."""
    return Path(os.path.realpath(path))


def as_shown(path: str | Path) -> Path:
    """Return `path` as the user wrote it, or where it leads where ".." makes that depend on what is
    there."""
    return resolved(path) if ".." in Path(path).parts else Path(path)


def name_problem(name: str) -> str | None:
    """Return why `name` cannot be a part of a file's name, or None if it can."""
    if not name or not name.isprintable():
        return "it must be a name of printable characters"
    if "/" in name or "\\" in name or name.startswith("."):
        return "it becomes part of a file's name, so it must not hold / or \\ or begin with a dot"
    if len(name.encode()) > _PART_BYTES:
        return (
            f"it becomes part of a file's name, so it must not be longer than {_PART_BYTES} bytes"
        )
    return None


def _beside(path: Path, before: str, after: str) -> Path:
    """Return a neighbor of `path` that is named after it; a name too long for that is cut, and told
    by its hash."""
    name = os.fsencode(path.name)
    if len(name) + len(before) + len(after) > _NAME_BYTES:
        name = name[:150] + hashlib.sha256(name).hexdigest()[:16].encode()
    return path.with_name(before + os.fsdecode(name) + after)


# -- single files that their caller owns -----------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name beside `path`, then rename."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Return an empty file that takes the place of `path` when the block ends well, and vanishes
    otherwise.

    A link at `path` is replaced itself, not what it points to.
    """
    path = resolved(path.parent) / path.name
    with writing(path, _ROOM), _staged(path, _PATIENCE) as stage:
        stage.making.touch()
        yield stage.making
        _finish(stage.making)
        stage.making.replace(path)
        _sync(path.parent)


@contextmanager
def writing(path: str | Path, advice: str = _ADVICE) -> Iterator[None]:
    """Turn what libraries raise when the system does not write into a ConfigError that names
    `path`."""
    try:
        yield
    except Exception as error:
        reason = _why_unwritten(error)
        if reason is None:
            raise
        raise ConfigError(f"output {str(path)!r} cannot be written ({reason}); {advice}") from error


def _why_unwritten(error: Exception) -> str | None:
    """Return the system's reason; None for an error that is not about writing."""
    # from the writing of a part
    if isinstance(error, ConfigError) and isinstance(error.__cause__, Exception):
        return _why_unwritten(error.__cause__)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers raise errors of their own kinds, PyTorch a RuntimeError without the
    # reason.
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is not None:
        return os.strerror(int(found[1]))
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return "PyTorch could not write; is the disk full?"
    return None


# -- outputs of commands ---------------------------------------------------------------------------


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
    _stage: _Stage
    _before: Entries | None

    @contextmanager
    def whole(self) -> Iterator[Path]:
        """Return an empty file, or folder, that is put in place when the block ends well.

        What was there at the start is replaced. What has come or changed since then is not: ours
        lies beside it then.
        """
        making = self._stage.making
        with writing(self.shown, self.advice):
            yield making
            if making.is_dir():
                _write_mark(making)
            _finish(making)
            self._stage.note(_entries(making), self._before)
        try:
            self._put_in_place(making)
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, FileExistsError):
                reason = (
                    "it has come there, or has changed, while evatune worked, and is left alone"
                )
            aside = _move_aside(making, self.path, ".new")
            raise ConfigError(
                f"output {str(self.shown)!r} cannot be replaced ({reason}); the new one is"
                f" {str(aside)!r}"
            ) from error
        with writing(self.shown, self.advice):
            _sync(self.path.parent)

    def remove(self) -> None:
        """Remove what was there at the start, unless it has changed since."""
        if self._before is not None and _entries(self.path) == self._before:
            self._stage.note(self._before, _entries(self._stage.making))
            self.path.rename(self._stage.making)
            self._stage.clear()

    def _put_in_place(self, making: Path) -> None:
        """Raise FileExistsError for what must not be replaced."""
        now = _entries(self.path)
        if now is None:
            _rename_new(making, self.path)
        elif now != self._before:
            raise _exists(self.path)
        elif not _renameat2(making, self.path, _EXCHANGE):
            self._exchange_in_two_steps(making)
        elif _entries(making) != self._before:  # it changed in that very moment
            _renameat2(making, self.path, _EXCHANGE)
            raise _exists(self.path)

    def _exchange_in_two_steps(self, making: Path) -> None:
        if making.is_dir():
            # whoever is killed here, the next command puts it back
            self.path.rename(self._stage.old)
            if _entries(self._stage.old) != self._before:
                _rename_new(self._stage.old, self.path)
                raise _exists(self.path)
            _rename_new(making, self.path)
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
        _require_own_folder(path, shown)

    with _claimed(out, overwrite, Path.mkdir, require, _ADVICE) as output:
        yield output


@contextmanager
def claimed_file(
    out: str | Path, overwrite: bool, is_ours: Callable[[Path], bool], advice: str = _ADVICE
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
    """Raise a ConfigError if `out` is or holds one of the `sources`, which are read:
    adapter=path."""
    path = resolved(out)
    for what, source in sources.items():
        if source is not None and os.path.lexists(source) and resolved(source).is_relative_to(path):
            relation = "is" if resolved(source) == path else "holds"
            raise ConfigError(f"output {str(out)!r} {relation} the {what} itself; {_ADVICE}")


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
        if _is_there(path) and not (overwrite and path.name):
            require(path, shown)  # at once, before anything is made
        missing = [parent for parent in path.parents if not parent.exists()]  # innermost first
    try:
        with writing(shown, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            stage = _Stage.claimed(path, shown)
        try:
            with writing(shown, advice):
                make(stage.making)
                before = _entries(path)
                if before is not None:
                    require(path, shown)
            yield Output(path, shown, advice, stage, before)
        finally:
            stage.release()
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def _require_own_folder(path: Path, shown: Path) -> None:
    """Raise a ConfigError unless the folder holds what its mark lists, and nothing else."""
    listed = _read_mark(path)
    if listed is None:
        names = sorted(os.listdir(path))[:3] if path.is_dir() else []
        raise ConfigError(
            f"output {str(shown)!r} exists and was not written by evatune, or by a version that"
            f" left no list of its files in {MARK} ({', '.join(names) or 'nothing'} is there), so"
            " --overwrite leaves it alone; name another with --out, or remove it yourself"
        )
    folders = {str(parent) for name in listed for parent in Path(name).parents} - {"."}
    foreign = []
    for name in sorted(_entries(path) or {}):
        inside = path / name
        if name in ("", MARK) or (name in folders and stat.S_ISDIR(inside.lstat().st_mode)):
            continue
        if not stat.S_ISREG(inside.lstat().st_mode) or listed.get(name) != _description(inside):
            foreign.append(name)
    if foreign:
        raise ConfigError(
            f"output {str(shown)!r} holds what evatune did not write, or what has changed since"
            f" ({', '.join(foreign[:3])}{' …' if foreign[3:] else ''}), so --overwrite leaves it"
            " alone; move that away, or name another folder with --out"
        )


def _write_mark(folder: Path) -> None:
    """List the files of a finished folder."""
    files = {
        path.relative_to(folder).as_posix(): _description(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"format": _FORMAT, "evatune": __version__, "files": files}
    (folder / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """Return what the folder lists as written by us; None where there is no such list."""
    try:
        if not stat.S_ISREG((folder / MARK).lstat().st_mode):
            return None
        record = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if (
        not isinstance(record, dict)
        or record.get("format") != _FORMAT
        or not isinstance(record.get("files"), dict)
    ):
        return None
    files: dict[str, Any] = record["files"]
    return files


def _description(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


# -- the stage -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
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
    def claimed(cls, path: Path, shown: Path, patience: float = 0.0) -> _Stage:
        """Lock the stage of `path`, after clearing what a killed command left in it.

        Raises:
            ConfigError: another process holds it for longer than `patience` seconds, or it is not
                ours.
        """
        folder = _beside(path, ".", ".evatune")
        lock = FileLock(folder / "lock", timeout=patience)
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
        """Write down what may be deleted here, before anything is exchanged."""
        journal = self.folder / "journal"
        journal.write_text(
            json.dumps([entries for entries in ours if entries is not None]), encoding="utf-8"
        )
        _sync(journal)
        _sync(self.folder)

    def clear(self) -> None:
        """Remove what is ours of what a command left here, and put back what it had taken away."""
        noted = self._noted()
        if os.path.lexists(self.old) and _entries(self.path) is None:
            _rename_new(self.old, self.path)
        if os.path.lexists(self.old) and (not noted or _entries(self.path) != noted[0]):
            self._keep(self.old)
        for left in (self.making, self.old):
            if noted is None:
                _remove(left)  # it was never in another place
            elif not _remove_noted(left, noted):
                self._keep(left)
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
        """Return the journal; None where there is none, or half of one, so that nothing has been
        exchanged yet."""
        try:
            noted: list[Entries] = json.loads((self.folder / "journal").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return noted

    def _keep(self, left: Path) -> None:
        aside = _move_aside(left, self.path, ".kept")
        raise ConfigError(
            f"what was in {str(self.path)!r} has changed while evatune replaced it, and is now"
            f" {str(aside)!r}; look at it, then run the command again"
        )


@contextmanager
def _staged(path: Path, patience: float) -> Iterator[_Stage]:
    stage = _Stage.claimed(path, path, patience)
    try:
        yield stage
    finally:
        stage.release()


def _is_stage(folder: Path, *, locked: bool) -> bool:
    """Return whether the folder is a stage of ours: by its mark, or empty but for one that was cut
    short."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        names = set(os.listdir(folder))
        mark = (folder / "mark").read_bytes() if "mark" in names else b""
        lock = (folder / "lock").lstat().st_size if "lock" in names and not locked else 0
    except OSError:  # it went meanwhile
        return False
    if mark == _STAGE_MARK:
        return names <= _STAGE_FILES
    return names <= {"lock", "mark"} and _STAGE_MARK.startswith(mark) and lock == 0


# -- the system ------------------------------------------------------------------------------------


def _entries(path: Path) -> Entries | None:
    """Return what identifies the file or folder and everything below it, links not followed; None
    if it is absent."""
    try:
        found = {"": _identity(path)}
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(path.lstat().st_mode):
        for parent, folders, files in os.walk(path):
            for name in (*folders, *files):
                inside = Path(parent, name)
                found[inside.relative_to(path).as_posix()] = _identity(inside)
    return found


def _is_there(path: Path) -> bool:
    """Return whether there is anything, a dangling link included; OSError for a path that cannot
    be."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _identity(path: Path) -> list[int]:
    info = path.lstat()
    return (
        [info.st_ino]
        if stat.S_ISDIR(info.st_mode)
        else [info.st_ino, info.st_size, info.st_mtime_ns]
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_noted(path: Path, noted: list[Entries]) -> bool:
    """Remove what has been noted; False where something else is among it, which then stays."""
    entries = _entries(path) or {}
    if any(all(one.get(name) != identity for one in noted) for name, identity in entries.items()):
        return False
    try:
        for name in sorted(entries, key=lambda name: name.count("/") + bool(name), reverse=True):
            inside = path / name
            inside.rmdir() if len(entries[name]) == 1 else inside.unlink()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _move_aside(path: Path, out: Path, ending: str) -> Path:
    """Rename to a free name beside `out`, and return it."""
    for number in range(1, _ASIDE + 1):
        aside = _beside(out, "", ending if number == 1 else f"{ending}-{number}")
        with suppress(FileExistsError):
            _rename_new(path, aside)
            return aside
    raise ConfigError(
        f"{str(_beside(out, '', ending))!r} and {_ASIDE - 1} more are there; look at them and"
        " remove them"
    )


def _rename_new(path: Path, target: Path) -> None:
    """Rename to a name that is free, or raise FileExistsError."""
    if not _renameat2(path, target, _NOREPLACE):
        if os.path.lexists(target):
            raise _exists(target)
        path.rename(target)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _renameat2(path: Path, target: Path, flags: int) -> bool:
    """Rename as Linux can: without replacing, or exchanging two names in one step. False where that
    is not to be had."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    sys.audit("os.rename", path, target, -1, -1)  # as os.rename does
    if function(_HERE, os.fsencode(path), _HERE, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(path), None, str(target))


def _finish(made: Path) -> None:
    """See to the usual permissions and that it is on the disk: temporary folders and safetensors'
    files are private."""
    mask = umask()
    inside = list(made.rglob("*")) if made.is_dir() else []
    for path in (*inside, made):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _sync(path)


def _sync(path: Path) -> None:
    """Write to the disk what the system still holds in memory, where a file system can do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def umask() -> int:
    """Return the process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
