"""The mark: a list, in each folder that evatune wrote, of the files that it wrote there.

A folder that holds anything else is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError
from evatune.utils.system import entries_of
from evatune.version import __version__

MARK = "evatune.json"  # lists what a folder of ours holds
_FORMAT = "evatune-output-1"


def require_unchanged_folder(path: Path, shown: Path) -> None:
    """Raise a ConfigError unless the folder holds what its mark lists, and nothing else."""
    listed = read_mark(path)
    if listed is None:
        names = sorted(os.listdir(path))[:3] if path.is_dir() else []
        raise ConfigError(
            f"output {str(shown)!r} exists and was not written by evatune, or by a version that"
            f" left no list of its files in {MARK} ({', '.join(names) or 'nothing'} is there), so"
            " --overwrite leaves it alone; name another with --out, or remove it yourself"
        )
    foreign = _foreign_entries(path, listed)
    if foreign:
        raise ConfigError(
            f"output {str(shown)!r} holds what evatune did not write, or what has changed since"
            f" ({', '.join(foreign[:3])}{' …' if foreign[3:] else ''}), so --overwrite leaves it"
            " alone; move that away, or name another folder with --out"
        )


def _foreign_entries(folder: Path, listed: dict[str, Any]) -> list[str]:
    """Return what lies in the folder and is not, or no longer, as the mark lists it."""
    listed_folders = {str(parent) for name in listed for parent in Path(name).parents} - {"."}
    foreign = []
    for name in sorted(entries_of(folder) or {}):
        if name in ("", MARK):
            continue
        path = folder / name
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode) and name in listed_folders:
            continue
        if not stat.S_ISREG(mode) or listed.get(name) != _description(path):
            foreign.append(name)
    return foreign


def write_mark(folder: Path) -> None:
    """List the files of a finished folder."""
    files = {
        path.relative_to(folder).as_posix(): _description(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"format": _FORMAT, "evatune": __version__, "files": files}
    (folder / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_mark(folder: Path) -> dict[str, Any] | None:
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
