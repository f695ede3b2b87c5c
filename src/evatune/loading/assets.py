"""Small checkpoints of our own, from the package evatune-assets."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from evatune.errors import DataError
from evatune.utils.extras import missing

_PACKAGE = "evatune_assets"


def asset(
    name: str, purpose: str = "this recipe", otherwise: str = "name a model with model="
) -> Path:
    """Return a checkpoint's folder: in this checkout, or else in the installed package.

    Args:
        purpose: what needs it. otherwise: what else would help, both for the message.

    Raises:
        MissingExtraError: the package is not installed.
        DataError: it is, and has no checkpoint of this name.
    """
    folder = _home(purpose, otherwise) / name
    if not folder.is_dir():
        raise DataError(
            f"evatune-assets has no checkpoint {name!r} in {str(folder.parent)!r}; install it"
            " again, or name a model"
        )
    return folder


def _home(purpose: str, otherwise: str) -> Path:
    in_checkout = Path(__file__).parents[3] / "assets" / "src" / _PACKAGE
    if in_checkout.is_dir():
        return in_checkout
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise missing(_PACKAGE, purpose, otherwise)
    return Path(next(iter(spec.submodule_search_locations)))
