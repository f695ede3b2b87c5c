"""Tasks and seeds of Meta-World."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from evatune.finetune.recipe_files import bundled_recipes, load
from evatune.finetune.tasks import rl
from evatune.finetune.tasks.rl.simulator import (
    PLAY,
    TEST,
    TRAIN,
    VALIDATION,
    VALIDATION_PLAY,
    Episode,
    Simulator,
    seed_for,
)

torch.set_num_threads(1)
# Where MuJoCo cannot draw, its half-made objects complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function"
    " (GLContext|Renderer).__del__:pytest.PytestUnraisableExceptionWarning"
)


def test_a_seed_is_a_goal_and_purposes_share_none() -> None:
    with closing(Simulator("push")) as simulator:
        first = [simulator.episode(seed).state.tobytes() for seed in (0, 0, 1, 2, 3)]
    assert first[0] == first[1]
    assert len(set(first)) == 4
    purposes = (TRAIN, VALIDATION, TEST, VALIDATION_PLAY, PLAY)
    seeds = [{seed_for(purpose, number) for number in range(100)} for purpose in purposes]
    assert len(set.union(*seeds)) == 500


@pytest.mark.parametrize("task", ["push", "window-close"])
def test_episodes_that_share_a_world_do_not_disturb_each_other(task: str) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 2, 4)).astype(np.float32)

    def alone(which: int) -> list[np.ndarray]:
        with closing(Simulator(task)) as simulator:
            episode = simulator.episode(which)
            return [advance(episode, action) for action in actions[:, which]]

    def advance(episode: Episode, action: np.ndarray) -> np.ndarray:
        episode.step(action)
        return episode.state

    with closing(Simulator(task)) as simulator:
        episodes = [simulator.episode(which) for which in (0, 1)]
        together = [
            [advance(episode, action) for episode, action in zip(episodes, pair, strict=True)]
            for pair in actions
        ]
    for which in (0, 1):
        np.testing.assert_array_equal([pair[which] for pair in together], alone(which))


def test_every_recipe_names_a_task() -> None:
    found = [load(name) for name in bundled_recipes() if name.startswith("rl-")]
    assert {recipe.task for recipe in found} <= set(rl.TASKS)
    assert len({recipe.task for recipe in found}) == len(found)
    assert all(recipe.domain == "rl" for recipe in found)
