"""The head of a model, whose modules a task names by the endings of their paths."""

from __future__ import annotations

from collections.abc import Iterable


def is_in_head(parameter: str, head: Iterable[str]) -> bool:
    """Return whether a parameter's path leads through one of the head's modules."""
    path = parameter.split(".")
    return any(module in path for module in head)
