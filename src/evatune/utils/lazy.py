"""Names of a package that load the module they come from when they are first asked for."""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False  # true for type checkers; typing itself takes longer to load than all of this

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def names_from(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package (PEP 562), each of whose names has a home.

    Args:
        homes: name → its module, relative to evatune.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: Any = getattr(import_module(f"evatune.{homes[name]}"), name)
        vars(sys.modules[package])[name] = value
        return value

    return get
