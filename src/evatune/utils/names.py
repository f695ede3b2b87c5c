"""Names and places of files: where a path leads, and what may be part of a name."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

CALIBRATION_FILE = "calibration.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's
_NAME_BYTES = 255  # of a name, on nearly every file system
_MOST_PART_BYTES = 100  # of a name's part that comes from a recipe


def resolved(path: str | Path) -> Path:
    """Return where `path` leads, absolute and without links or "..".

    So the place that is checked is the place that is written.
    """
    return Path(os.path.realpath(path))


def as_shown(path: str | Path) -> Path:
    """Return `path` as the user wrote it; resolved where it has "..", which links may redirect."""
    return resolved(path) if ".." in Path(path).parts else Path(path)


def stays_below(name: str) -> bool:
    """Return whether a name in an archive leads to a place below where the archive is unpacked."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def name_problem(name: str) -> str | None:
    """Return why `name` cannot be a part of a file's name, or None if it can."""
    if not name or not name.isprintable():
        return "it must be a name of printable characters"
    if "/" in name or "\\" in name or name.startswith("."):
        return "it becomes part of a file's name, so it must not hold / or \\ or begin with a dot"
    if len(name.encode()) > _MOST_PART_BYTES:
        return (
            "it becomes part of a file's name, so it must not be longer than"
            f" {_MOST_PART_BYTES} bytes"
        )
    return None


def beside(path: Path, before: str, after: str) -> Path:
    """Return a path in the same folder that is named after `path`.

    A name too long for that is cut, and distinguished by its hash.
    """
    name = os.fsencode(path.name)
    if len(name) + len(before) + len(after) > _NAME_BYTES:
        name = name[:150] + hashlib.sha256(name).hexdigest()[:16].encode()
    return path.with_name(before + os.fsdecode(name) + after)


def hub_id(source: str | Path) -> str | None:
    """Return the id on the model hub that a model or data set was loaded by; None for a local path.

    A snapshot in the hub's cache folder is known by its folder's name.
    """
    text = str(source)
    cached = re.search(r"(?:models|datasets)--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", text)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text) is not None
    return text if is_id and not Path(text).exists() else None


def short_name(source: str | Path) -> str:
    """Return what a model or data set is called: its hub id, or the last part of its path."""
    return hub_id(source) or Path(source).name or str(source)
