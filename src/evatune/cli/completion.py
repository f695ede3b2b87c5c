"""Completions that the shell offers where Tab is pressed."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """Return the recipes of ours whose names begin with what is there."""
    from evatune.finetune.recipe_files import ours

    return [name for name in ours() if name.startswith(incomplete)]
