"""Recipes as plain values, as YAML and JSON hold them, and back, with every mistake told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from evatune.errors import ConfigError
from evatune.finetune.recipe import (
    COSINE_WITH_MIN_LR,
    SIZES,
    SUCCESS,
    USER_TASK,
    AdapterOptions,
    DataOptions,
    Recipe,
    TrainingOptions,
)
from evatune.finetune.recipe_keys import nearest_key, recipe_keys
from evatune.schemas import short_repr

# Settings that came later than the first runs, by part.
_ADDED_SINCE = {
    "data": ("chat_template", "metric", "more_test_splits"),
    "adapter": ("bias", "quantize"),
    "training": ("gradient_checkpointing", "sharding", "floor", "max_grad_norm"),
}
_MISTAKES_TOLD = 10
_WITH_METRICS = "understanding"  # the domain of most metrics
_TASK_BYTES = 80  # of the part of a task's name that comes from a file's
_FEWEST_TOKENS = 4  # of a text: two words and what a tokenizer puts around them


def parse(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Return a recipe from a tree of plain values; see `load` for errors."""
    tree = _with_own_data(_with_alpha(_with_numbers(tree)))
    try:
        recipe = TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        mistakes = [
            _explain(".".join(map(str, item["loc"])), item)
            for item in error.errors()[:_MISTAKES_TOLD]
        ]
        count = "1 mistake" if error.error_count() == 1 else f"{error.error_count()} mistakes"
        more = "; …" if error.error_count() > len(mistakes) else ""
        raise ConfigError(f"{source} has {count}: {'; '.join(mistakes)}{more}") from error
    mistake = _between_keys(recipe)
    if mistake is not None:
        raise ConfigError(f"{source} has 1 mistake: {mistake}")
    return recipe


def _between_keys(recipe: Recipe) -> str | None:
    """Return why settings that are valid each do not go together; None if they do."""
    data, usual = recipe.data, DataOptions()
    for key in ("metric", "more_test_splits"):
        value = getattr(data, key)
        domain = "rl" if value == SUCCESS else _WITH_METRICS
        if value != getattr(usual, key) and recipe.domain != domain:
            return (
                f"data.{key} is for the domain {domain}, and this is {recipe.domain}; leave it out"
            )
    for name in ("train", "test"):
        if data.source is None and getattr(data, name) == 0:
            return f"data.{name} is 0, which is for data.source; give at least 1"
    training = recipe.training
    if training.floor and training.schedule != COSINE_WITH_MIN_LR:
        return (
            f"training.floor is for training.schedule={COSINE_WITH_MIN_LR}, and this is"
            f" {training.schedule}; leave one of them out"
        )
    if recipe.domain != "rl" and data.max_length < _FEWEST_TOKENS:
        return (
            f"data.max_length is {data.max_length}, but texts need at least {_FEWEST_TOKENS} tokens"
        )
    return None


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, as YAML and JSON hold them.

    Settings added after the first runs are left out at their default, so that those runs keep the
    same digest.
    """
    tree = dataclasses.asdict(recipe)
    if not recipe.trust_remote_code:
        del tree["trust_remote_code"]
    for path, default in _left_out().items():
        part, _, key = path.rpartition(".")
        if part and tree[part][key] == default:
            del tree[part][key]
    return tree


def all_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings by path, with the defaults that `as_tree` leaves out."""
    return _left_out() | flat(tree)


@cache
def _left_out() -> dict[str, Any]:
    """Return path → default of the settings that `as_tree` leaves out where they have it."""
    usual = {"data": DataOptions(), "adapter": AdapterOptions(), "training": TrainingOptions()}
    later = {
        f"{part}.{key}": getattr(usual[part], key)
        for part, keys in _ADDED_SINCE.items()
        for key in keys
    }
    return {"trust_remote_code": False} | later


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree with the path of each value as its key: {"training.steps": 60, …}."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return values


def _with_numbers(value: Any) -> Any:
    """Return the tree with numbers where YAML reads text or a fraction.

    It reads 1e-3, without a point, as text; and 1e3 steps are a whole number of them.
    """
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, str) and "e" in value.lower():
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


def _with_alpha(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree with an alpha as large as the rank, where it has a rank alone."""
    adapter = tree.get("adapter")
    if not isinstance(adapter, Mapping) or "alpha" in adapter or "rank" not in adapter:
        return tree
    rank = adapter["rank"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        return tree  # which is told as a mistake of the rank
    return {**tree, "adapter": {**adapter, "alpha": rank}}


def _with_own_data(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree with the task's name and sizes, where `data.source` implies them."""
    data = tree.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("source"), str):
        return tree
    stem = Path(data["source"]).stem
    name = "".join(sign if sign.isprintable() else "_" for sign in stem) or "data"
    implied = {"task": f"{USER_TASK}-{name.encode()[:_TASK_BYTES].decode(errors='ignore')}"}
    return {**implied, **tree, "data": {**dict.fromkeys(SIZES, 0), **data}}


def _explain(key: str, item: Mapping[str, Any]) -> str:
    """Return what is wrong with a key, from pydantic's account of it."""
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        nearest = nearest_key(key, [each.name for each in recipe_keys()])
        return f"unknown key {short_repr(key)}" + (f" (nearest: {nearest})" if nearest else "")
    if item["type"] in ("missing", "missing_argument"):
        return f"key {short_repr(key)} is missing"
    if item["type"] == "literal_error":
        kinds = {each.name: each.kind for each in recipe_keys()}
        return f"{key} is {short_repr(item['input'])}: choose {kinds[key]}"
    return f"{key} is {short_repr(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"
