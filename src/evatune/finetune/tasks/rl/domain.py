"""Reinforcement learning: a Decision Transformer that imitates experts and plays."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers

from evatune.errors import ConfigError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.base import Domain, Task
from evatune.finetune.tasks.rl import simulator
from evatune.finetune.tasks.rl.demonstrations import demonstrations
from evatune.finetune.tasks.rl.playing import play
from evatune.finetune.tasks.rl.policy import Imitator, Windows, rows_without_padding
from evatune.finetune.tasks.rl.simulator import ACTIONS, STATES, TASKS, TEST, TRAIN, VALIDATION
from evatune.loading.assets import asset
from evatune.loading.hub import reading, require_path

_INSTEAD = "a local folder with config.json and weights"


def prepare(recipe: Recipe) -> Task:
    """Load everything a run needs.

    `data.train`, `data.validation` and `data.test` count episodes, `data.max_length` steps of a
    window.

    Raises ConfigError for an unknown task or a model that does not fit, DataError where Meta-World
    is missing.
    """
    data = recipe.data
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

    def windows(purpose: int, count: int) -> Windows:
        return Windows(demonstrations(recipe.task, purpose, count), data.max_length)

    return Task(
        model=model,
        train=windows(TRAIN, data.train),
        validation=None if data.validation == 0 else windows(VALIDATION, data.validation),
        test=windows(TEST, data.test),
        collator=transformers.default_data_collator,
        head=["predict_action"],
        new_head=False,
        task_type=None,
        evaluate=partial(play, task=recipe.task, episodes=data.episodes, length=data.max_length),
        rows=rows_without_padding,
    )


def _load_model(recipe: Recipe) -> Any:
    """Return the policy; ConfigError for a model of another kind or size."""
    source = asset("dt-metaworld") if recipe.model == "demo" else recipe.model
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


DOMAIN = Domain("rl", prepare)
