"""What tasks need beside code: downloads with a checked hash, data built once, checkpoints of our
own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evatune.errors import DataError
from evatune.loading.package_index import fetch
from evatune.utils.atomic import atomic_file


def cache_folder() -> Path:
    """Where downloads and built data are kept: $EVATUNE_CACHE, else evatune in the user's cache
    folder."""
    base = os.environ.get("EVATUNE_CACHE")
    return (
        Path(base)
        if base
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evatune"
    )


def asset(name: str) -> Path:
    """Folder of a checkpoint that comes with evatune: in the installed package, or at the root of a
    checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "assets" / name, package.parents[1] / "assets" / name):
        if folder.is_dir():
            return folder
    raise DataError(
        f"the checkpoint {name!r} that comes with evatune is missing; install evatune again, or"
        " name a model"
    )


def built(
    name: str, settings: Mapping[str, Any], build: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors that are a function of `settings`, built once and then read.

    The file carries the hash of what it holds; one that was damaged is built again.

    Args:
        settings: plain values that the tensors depend on, a version of the code that builds them
            among them.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{digest}.safetensors"
    found = _read(path)
    if found is None:
        found = {key: value.contiguous() for key, value in build().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"sha256": _hash_of(found), "settings": json.dumps(settings, sort_keys=True)}
        with atomic_file(path) as temporary:
            save_file(found, temporary, metadata=metadata)
    return found


def downloaded(project: str, filename: str, sha256: str, what: str) -> Path:
    """Return a file of the package index, downloaded once and checked; nothing in it is run.

    Args:
        project: name on the index. filename: of the project's file, such as a source distribution.
        sha256: what its hash must be. what: for the message, such as "the sentiment data".

    Raises:
        DataError: it cannot be had, or is another file.
    """
    target = cache_folder() / filename
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    content = fetch(project, filename, sha256, what, f"put the file at {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary:
        temporary.write_bytes(content)
    return target


def _read(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
            expected = (file.metadata() or {}).get("sha256")
    except SafetensorError:
        return None
    return found if expected == _hash_of(found) else None


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
