"""Completions that the shell offers where Tab is pressed."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """Return the recipes of ours whose names begin with what is there."""
    from evatune.finetune.recipe_files import bundled_recipes

    return [name for name in bundled_recipes() if name.startswith(incomplete)]
