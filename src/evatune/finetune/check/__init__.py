"""Check of a recipe before a long run: whether it will work, and what it will cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from evatune.finetune.check.cost import (
    Memory,
    Size,
    Time,
    lengths_of,
    memory_of,
    size_of,
    time_of,
)
from evatune.finetune.check.plan import Need, Plan, plan_of
from evatune.finetune.check.trial import INSTEAD, Trial, try_recipe
from evatune.finetune.compatibility import require_compatible
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks import find_domain
from evatune.finetune.tasks.base import UNTRAINED
from evatune.loading.hub import cache_only, reading
from evatune.utils.launcher import require_alone

__all__ = ["Check", "Memory", "Need", "Plan", "Size", "Time", "Trial", "check"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of a check.

    Attributes:
        size, memory, time: None where the model's configuration cannot be had; the last two also
            for an architecture of which nobody knows how many tokens an example has.
        trial: None where something that it needs is not at hand. missing: that, by name.
    """

    recipe: Recipe
    plan: Plan
    size: Size | None
    memory: Memory | None
    time: Time | None
    trial: Trial | None
    missing: list[str]


def check(recipe: Recipe, *, download: bool = False) -> Check:
    """Return what is known of a recipe, and try it where all that this takes is at hand.

    Args:
        download: fetch data and what prepares a model's inputs, never its weights, for the trial.

    Raises what the run of the recipe would, as far as the trial can tell; ConfigError as one of
    several processes.
    """
    require_alone("evatune recipes check")
    find_domain(recipe.domain)
    require_compatible(find_method(recipe.method), recipe)
    with _readable(recipe) as readable:
        return _checked(readable, download)


@contextmanager
def _readable(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the recipe; where its model is to be a new one, with such a model in a folder."""
    new = find_domain(recipe.domain).models.untrained
    if recipe.model != UNTRAINED or new is None:
        yield recipe
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, UNTRAINED)
        new().save_pretrained(folder)
        yield replace(recipe, model=str(folder))


def _checked(recipe: Recipe, download: bool) -> Check:
    plan = plan_of(recipe)
    missing = [] if download else _missing(recipe, plan)
    trial = None
    if not missing:
        with cache_only(not download):
            trial = try_recipe(recipe)
    config = _config(recipe, plan)
    if config is None:
        size = memory = time = None
    else:
        task = trial.task if trial else None
        size = size_of(recipe, config, task.model.config.num_labels if task else None)
        lengths = lengths_of(recipe, config, task)
        memory = None if lengths is None else memory_of(recipe, size, lengths)
        time = None if lengths is None else time_of(recipe, size, lengths)
    return Check(
        recipe=recipe,
        plan=plan,
        size=size,
        memory=memory,
        time=time,
        trial=trial,
        missing=missing,
    )


def _missing(recipe: Recipe, plan: Plan) -> list[str]:
    """Return what a trial needs and is not at hand."""
    names = [need.source for need in plan.data if need.state != "at hand"]
    prepared = plan.needs[0].state == "at hand" or _has_preparation(recipe)
    return names if prepared else [recipe.model, *names]


def _has_preparation(recipe: Recipe) -> bool:
    """Return whether the hub's cache has a model's configuration and what prepares its inputs."""
    models = find_domain(recipe.domain).models
    kinds = ["AutoConfig", models.processor] if models.processor else ["AutoConfig"]
    try:
        with cache_only(True):
            for kind in kinds:
                getattr(transformers, kind).from_pretrained(
                    recipe.model, trust_remote_code=recipe.trust_remote_code
                )
    except Exception:  # of many kinds, all of which mean that it would have to be fetched
        return False
    return True


def _config(recipe: Recipe, plan: Plan) -> Any:
    """Return the configuration of a recipe's model, a few kilobytes; None where it is not had."""
    source = find_domain(recipe.domain).models.source(recipe)
    trust = recipe.trust_remote_code
    if plan.needs[0].state == "at hand":
        with reading(source, "a model", INSTEAD):
            return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
    try:
        with cache_only(not plan.reachable):
            return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
    except Exception:  # of many kinds; what a run would say of it, the trial does
        return None
