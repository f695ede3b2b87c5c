"""Reinforcement learning: a Decision Transformer that imitates experts and plays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from evatune.errors import ConfigError
from evatune.finetune.recipe import SUCCESS, DataOptions, Recipe
from evatune.finetune.tasks.base import UNTRAINED, DataSource, Domain, ModelKind, Task
from evatune.finetune.tasks.rl import simulator
from evatune.finetune.tasks.rl.archives import recorded, sources
from evatune.finetune.tasks.rl.demonstrations import demonstrations
from evatune.finetune.tasks.rl.playing import play
from evatune.finetune.tasks.rl.policy import (
    Imitator,
    PolicySize,
    Windows,
    new_policy,
    rows_without_padding,
)
from evatune.finetune.tasks.rl.scenarios import SCENARIOS, TASKS
from evatune.finetune.tasks.rl.simulator import ACTIONS, STATES, TEST, TRAIN, VALIDATION
from evatune.finetune.tasks.splits import Split
from evatune.loading.assets import asset
from evatune.loading.hub import reading, require_path

_INSTEAD = "a local folder with config.json and weights"
_PAPER = PolicySize(width=512, layers=4, heads=8, steps=50, dropout=0.2)
_SUCCEED = "share of the episodes that succeed"
_SOON = "mean share of the steps left at success"

Episodes = dict[str, Tensor]


def prepare(recipe: Recipe, max_examples: int | None = None) -> Task:
    """Load everything a run needs.

    `data.train`, `data.validation` and `data.test` count episodes, at least one of each of
    Meta-World's tasks: of scripted experts, or with `data.source` recorded ones. `data.max_length`
    counts steps of a window.

    Args:
        max_examples: episodes of each part, and of those that the policy plays.

    Raises ConfigError for an unknown task, a model that does not fit or sizes beyond the data,
    DataError where Meta-World or the episodes cannot be had.
    """
    data = _shortened(recipe.data, max_examples)
    if recipe.task not in TASKS:
        raise ConfigError(
            f"task is {recipe.task!r}; tasks of reinforcement learning are {', '.join(TASKS)}"
        )
    for key, value in {
        "adapter.quantize": recipe.adapter.quantize,
        "training.sharding": recipe.training.sharding,
    }.items():
        if value != "none":
            raise ConfigError(f"{key} is {value!r}, which policies are too small for; leave it out")
    simulator.load_metaworld()
    model = _load_model(recipe)
    longest = min(model.config.max_ep_len, model.config.n_positions // 3)
    if data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {data.max_length} steps, but this model sees {longest} at most;"
            " lower it"
        )
    tasks = SCENARIOS[recipe.task]
    episodes = _episodes(tasks, data)

    def apart(part: Episodes) -> Windows:
        """Return windows of which one ends where the next begins: actions are judged once."""
        return Windows(part, data.max_length, every=data.max_length)

    by_success = data.metric == SUCCESS
    return Task(
        models=MODELS,
        model=model,
        train=Windows(episodes.train, data.max_length),
        validation=apart(episodes.validation) if len(episodes.validation["lengths"]) else None,
        test=apart(episodes.test),
        collator=transformers.default_data_collator,
        head=MODELS.head(model),
        evaluate=partial(
            play,
            tasks=tasks,
            episodes=data.episodes,
            length=data.max_length,
            by_success=by_success,
        ),
        rows=rows_without_padding,
        score_name=_SUCCEED if by_success else _SOON,
        episodes=data.episodes,
    )


def _shortened(data: DataOptions, max_examples: int | None) -> DataOptions:
    """Return the options with at most so many episodes of each kind."""
    if max_examples is None:
        return data
    sizes = {key: getattr(data, key) for key in ("train", "validation", "test", "episodes")}
    return replace(data, **{key: min(size, max_examples) for key, size in sizes.items()})


def _episodes(tasks: Sequence[str], data: DataOptions) -> Split[Episodes]:
    """Return each part's episodes, as many of each task."""
    read = _demonstrated if data.source is None else recorded
    parts = [read(task, data, len(tasks)) for task in tasks]

    def joined(name: str) -> Episodes:
        of_tasks = [vars(part)[name] for part in parts]
        return {key: torch.cat([of_task[key] for of_task in of_tasks]) for key in of_tasks[0]}

    return Split(joined("train"), joined("validation"), joined("test"))


def _demonstrated(task: str, data: DataOptions, tasks: int) -> Split[Episodes]:
    """Return episodes of the task's expert for each part, of which `tasks` share the sizes."""

    def played(purpose: int, count: int) -> Episodes:
        return demonstrations(task, purpose, max(1, count // tasks))

    test = played(TEST, data.test)
    none = {key: value[:0] for key, value in test.items()}
    validation = played(VALIDATION, data.validation) if data.validation else none
    return Split(played(TRAIN, data.train), validation, test)


def _load_model(recipe: Recipe) -> Any:
    """Return the policy; ConfigError for a model of another kind or size."""
    if recipe.model == UNTRAINED:
        return _untrained()
    source = MODELS.source(recipe)
    require_path(source, "model")
    with reading(source, "a Decision Transformer", _INSTEAD):
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=recipe.trust_remote_code
        )
        sizes = [getattr(config, name, None) for name in ("state_dim", "act_dim")]
        if sizes == [STATES, ACTIONS]:
            return Imitator.from_pretrained(source, dtype=torch.float32)
    raise ConfigError(
        f"model {str(source)!r} is no Decision Transformer with state_dim {STATES} and act_dim"
        f" {ACTIONS} (it is {config.model_type} with {sizes[0]} and {sizes[1]}); name another,"
        " or demo"
    )


def _untrained() -> Any:
    return new_policy(_PAPER)


def _sources(recipe: Recipe) -> list[DataSource]:
    """Return the recordings of a recipe's tasks; none where experts play."""
    if recipe.data.source is None:
        return []
    return sources(recipe.data, SCENARIOS.get(recipe.task, ()))


MODELS = ModelKind(
    loader="AutoModel",
    demo=lambda recipe: asset("dt-metaworld"),
    head=lambda model: ["predict_action"],
    new_head=False,
    task_type=None,
    processor=None,
    untrained=_untrained,
)
DOMAIN = Domain("rl", prepare, MODELS, _sources)
