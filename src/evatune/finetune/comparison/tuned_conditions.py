"""The method and the condition of a run, by the settings in which runs of a task differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from evatune.finetune.methods import METHODS
from evatune.finetune.recipe_tree import all_settings
from evatune.schemas.tuned import RunLine

_ALPHA = "adapter.alpha"
_OF_THE_RUN = ("method", "seed", "training.learning_rate")
_OF_METHODS = tuple(dict.fromkeys(chain(*(method.own_settings for method in METHODS.values()))))


@dataclass(frozen=True)
class KnownRecipe:
    """The name of a recipe, as `evatune train` takes it, and its settings."""

    name: str
    settings: Mapping[str, Any]  # flat: {"training.steps": 60, …}


@dataclass(frozen=True)
class LabeledRun:
    """A run, with its method and its condition.

    Attributes:
        method: with settings that make it one of its own: "eva (rho 1)".
        condition: the settings in which it differs from the recipe, in words; "" for none.
        overrides: those settings, and the method's.
    """

    line: RunLine
    method: str
    condition: str
    overrides: Mapping[str, Any]


def label_runs(lines: Sequence[RunLine], recipe: KnownRecipe | None) -> list[LabeledRun]:
    """Return the lines of a task, each with its method and its conditions."""
    trees = [all_settings(line.tree()) for line in lines]
    base = trees[0] if recipe is None else recipe.settings
    differing = [_differing(tree, base) for tree in trees]
    shared = _shared(differing)
    labeled = []
    for line, tree, overrides in zip(lines, trees, differing, strict=True):
        of_method = {key: overrides[key] for key in _own_settings(line.method) if key in overrides}
        no_condition = {*_OF_THE_RUN, *_OF_METHODS, *shared, _ALPHA}
        condition = {key: value for key, value in overrides.items() if key not in no_condition}
        if _alpha_over_rank(tree) != _alpha_over_rank({**tree, **base}):
            condition[_ALPHA] = _alpha(tree)
        method = f"{line.method} ({_words(of_method)})" if of_method else line.method
        labeled.append(LabeledRun(line, method, _words(condition), overrides))
    return labeled


def _alpha_over_rank(tree: Mapping[str, Any]) -> float:
    """Return α/r, of which another value is another condition."""
    scale: float = _alpha(tree) / tree["adapter.rank"]
    return scale


def _alpha(tree: Mapping[str, Any]) -> float:
    alpha: float = tree.get(_ALPHA, tree["adapter.rank"])
    return alpha


def _differing(tree: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `base` has too, with another value."""
    return {key: value for key, value in tree.items() if base.get(key, value) != value}


def _shared(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that all have with the same value."""
    common = set.intersection(*map(set, settings))
    first = settings[0]
    return [key for key in common if all(other[key] == first[key] for other in settings)]


def _own_settings(method: str) -> tuple[str, ...]:
    """Return the settings that a method heeds and others do not; all where it is not known."""
    known = METHODS.get(method)
    return _OF_METHODS if known is None else known.own_settings


def _words(settings: Mapping[str, Any]) -> str:
    """Return settings in words: "rank 16, budget parameters"."""
    return ", ".join(f"{_word(key)} {_figure(value)}" for key, value in settings.items())


def _word(key: str) -> str:
    name = key.rsplit(".", 1)[-1].removeprefix("lora_plus_")  # beside the method's own name
    return name.replace("_", " ")


def _figure(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value
