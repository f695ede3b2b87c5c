"""Operations on files that Python's library lacks: rename without replacing, exchange, identify."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

from evatune.errors import ConfigError
from evatune.utils.names import beside

# Path below a folder ("" for itself) → inode, and for files size and time of change.
Entries = dict[str, list[int]]

_MOST_ASIDE = 100  # results that lie aside, at most
_NOREPLACE, _EXCHANGE = 1, 2  # of renameat2
_AT_FDCWD = -100  # AT_FDCWD


def entries_of(path: Path) -> Entries | None:
    """Return what identifies the file or folder and everything below it; None if it is absent.

    Links are not followed.
    """
    try:
        entries = {"": _identity(path)}
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(path.lstat().st_mode):
        for parent, folders, files in os.walk(path):
            for name in (*folders, *files):
                inside = Path(parent, name)
                entries[inside.relative_to(path).as_posix()] = _identity(inside)
    return entries


def is_there(path: Path) -> bool:
    """Return whether there is anything, a dangling link included.

    Raises OSError for a path that cannot exist.
    """
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


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_listed(path: Path, lists: list[Entries]) -> bool:
    """Remove what the lists name; False where something else is among it, which then stays."""
    entries = entries_of(path) or {}
    for name, identity in entries.items():
        if identity not in [listed.get(name) for listed in lists]:
            return False
    try:
        for name in sorted(entries, key=_depth, reverse=True):
            inside = path / name
            if len(entries[name]) == 1:
                inside.rmdir()
            else:
                inside.unlink()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _depth(name: str) -> int:
    """Return how many folders lie around an entry; 0 for "", the whole."""
    return name.count("/") + 1 if name else 0


def move_aside(path: Path, out: Path, ending: str) -> Path:
    """Rename to a free name beside `out`, and return it."""
    for number in range(1, _MOST_ASIDE + 1):
        aside = beside(out, "", ending if number == 1 else f"{ending}-{number}")
        with suppress(FileExistsError):
            rename_to_free_name(path, aside)
            return aside
    raise ConfigError(
        f"{str(beside(out, '', ending))!r} and {_MOST_ASIDE - 1} more are there; look at them and"
        " remove them"
    )


def rename_to_free_name(path: Path, target: Path) -> None:
    """Rename to a name that is free, or raise FileExistsError."""
    if not _renameat2(path, target, _NOREPLACE):
        if os.path.lexists(target):
            raise already_exists(target)
        path.rename(target)


def already_exists(path: Path) -> FileExistsError:
    """Return the error that the system raises for a name that is taken."""
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def exchange(path: Path, target: Path) -> bool:
    """Exchange what two names stand for in one step; False where the system cannot do that."""
    return _renameat2(path, target, _EXCHANGE)


def _renameat2(path: Path, target: Path, flags: int) -> bool:
    """Rename by Linux's renameat2: without replacing, or exchanging two names in one step.

    False where the system or the file system does not have it.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    sys.audit("os.rename", path, target, -1, -1)  # as os.rename does
    if function(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(path), None, str(target))


def finish(made: Path) -> None:
    """Give a finished file or folder the usual permissions, and flush it to the disk.

    Temporary folders, and the files that safetensors writes, are private.
    """
    mask = umask()
    inside = list(made.rglob("*")) if made.is_dir() else []
    for path in (*inside, made):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        sync(path)


def sync(path: Path) -> None:
    """Flush to the disk what the system still holds in memory, where a file system can do that."""
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
    known = process_status("Umask")
    if known is not None:
        return int(known, 8)
    # Where it can be read by setting it alone: other threads' files of this moment are open to all.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def process_status(name: str) -> str | None:
    """Return what Linux says of this process under a name of proc(5); None elsewhere."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = re.search(rf"^{name}:\s*(.+)$", text, re.MULTILINE)
        return None if line is None else line[1]
    return None
