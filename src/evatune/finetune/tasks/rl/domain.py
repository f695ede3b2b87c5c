"""Reinforcement learning: a Decision Transformer that imitates experts and plays."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from evatune.errors import ConfigError
from evatune.finetune.recipe import DataOptions, Recipe
from evatune.finetune.tasks.base import Domain, ModelKind, Task
from evatune.finetune.tasks.rl import simulator
from evatune.finetune.tasks.rl.demonstrations import demonstrations
from evatune.finetune.tasks.rl.playing import play
from evatune.finetune.tasks.rl.policy import Imitator, Windows, rows_without_padding
from evatune.finetune.tasks.rl.scenarios import SCENARIOS, TASKS, Scenario
from evatune.finetune.tasks.rl.simulator import ACTIONS, STATES, TEST, TRAIN, VALIDATION
from evatune.loading.assets import asset
from evatune.loading.hub import reading, require_path

_INSTEAD = "a local folder with config.json and weights"


def prepare(recipe: Recipe, most: int | None = None) -> Task:
    """Load everything a run needs.

    `data.train`, `data.validation` and `data.test` count episodes, at least one of each of
    Meta-World's tasks; `data.max_length` counts steps of a window.

    Args:
        most: episodes of each part, and of those that the policy plays.

    Raises ConfigError for an unknown task or a model that does not fit, DataError where Meta-World
    is missing.
    """
    data = _shortened(recipe.data, most)
    if recipe.task not in TASKS:
        raise ConfigError(
            f"task is {recipe.task!r}; tasks of reinforcement learning are {', '.join(TASKS)}"
        )
    simulator.load_metaworld()
    model = _load_model(recipe)
    longest = min(model.config.max_ep_len, model.config.n_positions // 3)
    if data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {data.max_length} steps, but this model sees {longest} at most;"
            " lower it"
        )
    scenario = SCENARIOS[recipe.task]

    def apart(purpose: int, count: int) -> Windows:
        """Return windows of which one ends where the next begins: actions are judged once."""
        episodes = _episodes(scenario, purpose, count)
        return Windows(episodes, data.max_length, every=data.max_length)

    return Task(
        model=model,
        train=Windows(_episodes(scenario, TRAIN, data.train), data.max_length),
        validation=None if data.validation == 0 else apart(VALIDATION, data.validation),
        test=apart(TEST, data.test),
        collator=transformers.default_data_collator,
        head=MODELS.head(model),
        new_head=MODELS.new_head,
        task_type=MODELS.task_type,
        evaluate=partial(
            play,
            tasks=scenario.tasks,
            robot=scenario.robot,
            episodes=data.episodes,
            length=data.max_length,
        ),
        rows=rows_without_padding,
        score_name="mean share of the steps left at success",
        episodes=data.episodes,
    )


def _shortened(data: DataOptions, most: int | None) -> DataOptions:
    """Return the options with at most so many episodes of each kind."""
    if most is None:
        return data
    sizes = {key: getattr(data, key) for key in ("train", "validation", "test", "episodes")}
    return replace(data, **{key: min(size, most) for key, size in sizes.items()})


def _episodes(scenario: Scenario, purpose: int, count: int) -> dict[str, Tensor]:
    """Return demonstrations as the scenario's robot sees them, as many of each task."""
    each = max(1, count // len(scenario.tasks))
    parts = [demonstrations(task, purpose, each) for task in scenario.tasks]
    episodes = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    robot = scenario.robot
    return episodes | {
        "states": robot.sees(episodes["states"]),
        "actions": robot.wants(episodes["actions"]),
        "labels": robot.wants(episodes["labels"]),
    }


def _load_model(recipe: Recipe) -> Any:
    """Return the policy; ConfigError for a model of another kind or size."""
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


MODELS = ModelKind(
    loader="AutoModel",
    demo=lambda recipe: asset("dt-metaworld"),
    head=lambda model: ["predict_action"],
    new_head=False,
    task_type=None,
    processor=None,
)
DOMAIN = Domain("rl", prepare, MODELS, lambda recipe: [])
