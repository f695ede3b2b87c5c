"""Files that are made once: downloads with a checked hash, and tensors that took long to build."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evatune.loading.package_index import fetch
from evatune.schemas.tensors import checksum
from evatune.utils.atomic import atomic_file, writing
from evatune.utils.progress import Display, display

_ADVICE = "make room or rights there, or name another folder in EVATUNE_CACHE"
_TIMEOUT = 1800.0  # seconds to wait for another process that builds the same


def cache_folder() -> Path:
    """Return $EVATUNE_CACHE, or else the folder evatune in the user's cache folder."""
    folder = os.environ.get("EVATUNE_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evatune"


def build_once(
    name: str,
    settings: Mapping[str, Any],
    build: Callable[[Display], dict[str, Tensor]],
    title: str,
    unit: str,
) -> dict[str, Tensor]:
    """Return tensors that are a function of `settings`: built the first time, then read.

    The file carries the hash of what it holds; one that was damaged is built again. Of processes
    that want the same at the same time one builds, and the others wait.

    Args:
        settings: plain values that the tensors depend on, a version of the code that builds them
            among them.
        build: tells the display, which is given to it, how far it is.
        title: what is done: "drawing images". unit: what is counted: "images".

    Raises ConfigError where the file cannot be written.
    """
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{digest}.safetensors"
    cached = _read(path)
    if cached is not None:
        return cached
    with _alone(path):
        cached = _read(path)  # by another process in the meantime
        if cached is not None:
            return cached
        # The terminal of a worker is its parent's.
        shown = multiprocessing.parent_process() is None
        with display(title, unit, shown=shown) as progress:
            tensors = {key: value.contiguous() for key, value in build(progress).items()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"sha256": checksum(tensors), "settings": text})
    return tensors


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process builds the file.

    After half an hour both do, which costs time alone.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with writing(path, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=_TIMEOUT)
    try:
        yield
    finally:
        lock.release()


def download_once(project: str, filename: str, sha256: str, what: str) -> Path:
    """Return a file of the package index, downloaded once and checked; nothing in it is run.

    Args:
        project: name on the index. filename: of the project's file, such as a source distribution.
        sha256: what its hash must be. what: for the message, such as "the sentiment data".

    Raises:
        DataError: it cannot be had, or is another file.
    """
    target = download_path(filename)
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    content = fetch(project, filename, sha256, what, f"put the file at {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary:
        temporary.write_bytes(content)
    return target


def download_path(filename: str) -> Path:
    """Return where `download_once` keeps a file."""
    return cache_folder() / filename


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except SafetensorError:
        return None
    return tensors if metadata.get("sha256") == checksum(tensors) else None
