"""Small checkpoints that come with evatune."""

from __future__ import annotations

from pathlib import Path

from evatune.errors import DataError


def asset(name: str) -> Path:
    """Return a checkpoint's folder: in the installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "assets" / name, package.parents[1] / "assets" / name):
        if folder.is_dir():
            return folder
    raise DataError(
        f"the checkpoint {name!r} that comes with evatune is missing; install evatune again, or"
        " name a model"
    )
