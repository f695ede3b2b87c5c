"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("evatune", "torch", "contextlib")  # whose frames lie between that line and ours


def warn(message: str) -> None:
    """Warn at the first line outside of evatune, and of torch's decorators."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)
