"""Tasks and seeds of Meta-World."""

from __future__ import annotations

import pytest
import torch

from evatune.finetune.recipe import load, ours
from evatune.finetune.tasks import rl
from evatune.finetune.tasks.rl.simulator import PLAY, TEST, TRAIN, environment, seed_for

torch.set_num_threads(1)
# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)


def test_a_seed_is_a_goal_and_purposes_share_none() -> None:
    first: list[bytes] = []
    for seed in (0, 0, 1, 2, 3):
        env = environment("push", seed)
        state, _ = env.reset()
        first.append(state.tobytes())
        env.close()
    assert first[0] == first[1]
    assert len(set(first)) == 4
    seeds = [
        {seed_for(purpose, number) for number in range(100)} for purpose in (TRAIN, TEST, PLAY)
    ]
    assert len(set.union(*seeds)) == 300


def test_there_is_a_recipe_for_every_task() -> None:
    found = [load(name) for name in ours() if name.startswith("rl-")]
    assert {recipe.task for recipe in found} == set(rl.TASKS)
    assert all(recipe.domain == "rl" for recipe in found)
