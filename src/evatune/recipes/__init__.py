"""Recipes: every setting of a fine-tuning run, with default and help, in one tree; and YAML files that fill it in."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from evatune.errors import ConfigError
from evatune.files import name_problem


def _require_name(name: str) -> str:
    problem = name_problem(name)
    if problem is not None:
        raise PydanticCustomError("file_name", problem)
    return name


Name = Annotated[str, AfterValidator(_require_name)]  # what becomes part of a path
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataOptions:
    """Which examples."""

    train: int = Field(
        default=1000, ge=1, description="examples to train on, drawn with the seed 0 whatever the run's seed is"
    )
    test: int = Field(default=500, ge=1, description="examples to evaluate on, none of them trained on")
    max_length: int = Field(default=48, ge=4, description="tokens per text, the rest is cut off; rl: steps the policy sees")
    source: str | None = Field(default=None, description="hub id, file or folder of the user's own data")
    subset: str | None = Field(default=None, description="configuration of a hub data set, such as sst2 of nyu-mll/glue")
    train_split: str = Field(default="train", description="split of data.source to train on")
    test_split: str | None = Field(default=None, description="split to evaluate on; default: unseen examples of train_split")
    columns: list[str] = Field(
        default_factory=list,
        description="columns of data.source: text, or a pair of texts; generation: prompt and answer; images: the image. "
        "Default: text, or image",
    )
    label_column: str = Field(default="label", description="column of data.source that holds the classes")
    episodes: int = Field(default=20, ge=1, description="rl: episodes in the simulator")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AdapterOptions:
    """The adapter, for the methods that have one."""

    rank: int = Field(default=8, ge=1, description="ranks per layer, before any redistribution")
    alpha: float = Field(default=8, gt=0, description="LoRA's alpha")
    rho: float = Field(default=2, ge=1, description="EVA: no layer gets more than rho times rank; 1 is no redistribution")
    budget: Literal["ranks", "parameters"] = Field(
        default="ranks", description="EVA: what redistribution keeps within that of uniform ranks"
    )
    targets: str | list[str] = Field(default="all-linear", description="layers, as PEFT names them")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingOptions:
    """The optimisation; AdamW, by transformers' Trainer."""

    learning_rate: float = Field(default=1e-3, gt=0, description="largest learning rate")
    steps: int = Field(default=60, ge=1, description="optimiser steps")
    batch_size: int = Field(default=16, ge=1, description="examples per batch and process")
    accumulate: int = Field(default=1, ge=1, description="batches whose gradients make one step")
    precision: Literal["float32", "bf16", "fp16"] = Field(default="float32", description="mixed precision, or none")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: str = Field(default="linear", description="learning rate after warm-up, as transformers names it")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay")
    lora_plus_ratio: float = Field(default=16.0, gt=0, description="loraplus: learning rate of B over that of A")
    log_every: int = Field(default=5, ge=1, description="steps between lines of metrics")
    eval_every: int = Field(default=20, ge=1, description="steps between evaluations")
    save_every: int = Field(default=20, ge=1, description="steps between checkpoints that a killed run resumes from")
    report_to: list[str] = Field(default_factory=list, description="trackers, as transformers names them")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Recipe:
    """One fine-tuning run."""

    domain: Name = Field(default="understanding", description="what kind of task it is")
    task: Name = Field(description="which task of the domain")
    model: str = Field(default="demo", description="hub id or local folder; demo: the small model of the domain")
    method: Name = Field(default="eva", description="what is trained and how it starts")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model; the command line alone can allow it"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of new weights, of the order of examples and of dropout")
    data: DataOptions = DataOptions()
    adapter: AdapterOptions = AdapterOptions()
    training: TrainingOptions = TrainingOptions()


def ours() -> list[str]:
    """Names of the recipes that come with evatune."""
    return sorted(path.name.removesuffix(".yaml") for path in files(__name__).iterdir() if path.name.endswith(".yaml"))


def expand(sources: Iterable[str]) -> list[str]:
    """Recipes and files, patterns of our names such as "images-*" replaced by the names. ConfigError if one fits none."""
    found: list[str] = []
    for source in sources:
        names = [source] if not any(sign in source for sign in "*?[") else fnmatch.filter(ours(), source)
        if not names:
            raise ConfigError(f"no recipe of ours fits {source!r}; ours are {', '.join(ours())}")
        found += names
    if not found:
        raise ConfigError(f"name at least one recipe; ours are {', '.join(ours())}")
    return list(dict.fromkeys(found))


def text_of(source: str) -> str:
    """The YAML text behind a name of ours or a path. Raises ConfigError if there is none."""
    if source in ours():
        return files(__name__).joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"recipe {source!r} is not a text in UTF-8; give a YAML file") from error
    near = difflib.get_close_matches(source, ours(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"there is no recipe or file {source!r}; {hint}ours are {', '.join(ours())}")


def load(source: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe of ours or of the user's, with `key=value` overrides such as `training.learning_rate=3e-4`.

    Raises ConfigError that lists every mistake at once, each with the nearest valid key.
    """
    try:
        raw = yaml.safe_load(text_of(source))
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {source!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"recipe {source!r} holds {type(raw).__name__}, not keys with values; `evatune recipes show` shows one"
        )
    if raw.get("trust_remote_code"):
        raise ConfigError(
            f"recipe {source!r} allows code of others to run (trust_remote_code), which only the command line can: leave "
            "the key out, and give --trust-remote-code if you trust the model's code"
        )
    tree: dict[str, Any] = raw
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"{override!r} is not key=value, such as training.steps=100")
        _put(tree, key, value)
    return parse(tree, source)


def parse(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from a tree of plain values; see `load` for errors."""
    try:
        return TypeAdapter(Recipe).validate_python(_with_numbers(tree))
    except ValidationError as error:
        mistakes = [_explain(".".join(map(str, item["loc"])), item) for item in error.errors()]
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{source} has {count}: {'; '.join(mistakes)}") from error


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, as YAML and JSON hold them. A permission that is not given is no part of them."""
    tree = dataclasses.asdict(recipe)
    return tree if recipe.trust_remote_code else {key: tree[key] for key in tree if key != "trust_remote_code"}


def keys(kind: Any = Recipe, prefix: str = "") -> dict[str, str]:
    """Every key with its help text, dotted: {"training.steps": "optimiser steps", …}."""
    found: dict[str, str] = {}
    for field in fields(kind):
        if is_dataclass(field.default):
            found |= keys(field.default, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = getattr(field.default, "description", None) or ""
    return found


def _put(tree: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = tree.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key!r} cannot be set: {parent!r} is a value and has no keys below it")
        tree = inner
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        tree[last] = text


def _with_numbers(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as text."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _explain(key: str, item: Mapping[str, Any]) -> str:
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = list(keys())
        last = {name.rsplit(".", 1)[-1]: name for name in valid}
        near = difflib.get_close_matches(key, valid, n=1) or [
            last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1)
        ]
        return f"unknown key {key!r}" + (f" (nearest: {near[0]})" if near else "")
    if item["type"] in ("missing", "missing_argument"):
        return f"key {key!r} is missing"
    return f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


__all__ = [
    "AdapterOptions",
    "DataOptions",
    "Recipe",
    "TrainingOptions",
    "as_tree",
    "expand",
    "keys",
    "load",
    "ours",
    "parse",
    "text_of",
]
