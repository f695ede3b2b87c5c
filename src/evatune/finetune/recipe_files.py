"""Recipes by name and by path: those that come with evatune, and YAML files of the user's."""

from __future__ import annotations

import difflib
import fnmatch
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError
from evatune.finetune.recipe import SIZES, USER_TASK, Recipe
from evatune.finetune.recipe_tree import parse
from evatune.loading.file_checks import json_name
from evatune.schemas import FormatError, raise_with_path
from evatune.schemas.text import parse_yaml, read_text

_RECIPES = files("evatune.finetune").joinpath("recipes")
_NAME_LINE = re.compile(r"^--- # (.+)\n", re.MULTILINE)
_SUFFIXES = (".yaml", ".yml", ".json", "")  # of recipes
_OWN_DATA = "data.source"


def bundled_recipes() -> list[str]:
    """Return the names of the recipes that come with evatune."""
    return sorted(_our_texts())


@cache
def _our_texts() -> Mapping[str, str]:
    """Return name → YAML text of the recipes that come with evatune.

    A file holds those of a family, each below a line `--- # NAME`; or one, whose name is its own.
    """
    texts: dict[str, str] = {}
    for file in _RECIPES.iterdir():
        if file.name.endswith(".yaml"):
            alone, *several = _NAME_LINE.split(file.read_text(encoding="utf-8"))
            if alone:
                texts[file.name.removesuffix(".yaml")] = alone
            texts |= zip(several[::2], several[1::2], strict=True)
    return texts


def expand(sources: Iterable[str]) -> list[str]:
    """Return recipes and files, with patterns such as "images-*" replaced by names of ours.

    Raises ConfigError for a pattern that fits none.
    """
    expanded: list[str] = []
    for source in sources:
        is_pattern = any(sign in source for sign in "*?[")
        names = fnmatch.filter(bundled_recipes(), source) if is_pattern else [source]
        if not names:
            raise ConfigError(
                f"no recipe of ours fits {source!r}; ours are {', '.join(bundled_recipes())}"
            )
        expanded += names
    if not expanded:
        raise ConfigError(f"name at least one recipe; ours are {', '.join(bundled_recipes())}")
    return list(dict.fromkeys(expanded))


def text_of(source: str) -> str:
    """Return the YAML text behind a name of ours or a path. ConfigError if there is none."""
    if source in _our_texts():
        return _our_texts()[source]
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix.lower() not in _SUFFIXES):
        raise ConfigError(f"{source!r} is no recipe, which is a YAML file; {_for_data(source)}")
    if path.is_file():
        with raise_with_path(
            source, "give a YAML file; `evatune recipes show` shows one", ConfigError
        ):
            return read_text(path)
    near = difflib.get_close_matches(source, bundled_recipes(), n=1, cutoff=0.4)
    names = f"ours are {', '.join(bundled_recipes())}"
    hint = f"did you mean {near[0]}? `evatune recipes ls` lists ours" if near else names
    raise ConfigError(f"there is no recipe or file {source!r}; {hint}")


def _for_data(source: str) -> str:
    name = f"{USER_TASK}-generation"
    return f"if it is data to train on: {name} data.source={shlex.quote(source)}"


def load(source: str, overrides: Iterable[str] = (), *, trust_remote_code: bool = False) -> Recipe:
    """Return a recipe of ours or of the user's, with overrides.

    Args:
        overrides: `key=value`, such as `training.learning_rate=3e-4`.
        trust_remote_code: code that comes with the model may run.

    Raises ConfigError that lists every mistake at once, each with the nearest valid key.
    """
    text = text_of(source)
    with raise_with_path(source, "`evatune recipes show` shows a recipe", ConfigError):
        raw = parse_yaml(text)
    if not isinstance(raw, dict):
        fault = "is empty" if raw is None else f"holds {json_name(type(raw))}"
        raise ConfigError(
            f"recipe {source!r} {fault}, not keys with values; `evatune recipes show` shows one;"
            f" {_for_data(source)}"
        )
    if raw.get("trust_remote_code"):
        raise ConfigError(
            f"recipe {source!r} allows code of others to run (trust_remote_code), which only the"
            " command line can: leave the key out, and give --trust-remote-code if you trust the"
            " model's code"
        )
    tree: dict[str, Any] = raw
    settings = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"{override!r} is not key=value, such as training.steps=100")
        settings.append((key, value))
    if _OWN_DATA in dict(settings):
        _leave_own_task(tree)
    for key, value in settings:
        _put(tree, key, value)
    if trust_remote_code:
        tree["trust_remote_code"] = True
    return parse(tree, source)


def _put(tree: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = tree.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{key!r} cannot be set: {parent!r} is a value and has no keys below it"
            )
        tree = inner
    try:
        tree[last] = parse_yaml(text)
    except FormatError:
        tree[last] = text


def _leave_own_task(tree: dict[str, Any]) -> None:
    """Remove task and sizes from a recipe for bundled data: the user's own data imply them."""
    data = tree.get("data")
    if isinstance(data, dict) and data.get("source") is not None:
        return  # a recipe for such data: another copy of them
    tree.pop("task", None)
    if isinstance(data, dict):
        for size in SIZES:
            data.pop(size, None)
