"""Episodes that scripted experts play."""

from __future__ import annotations

import warnings
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evatune.errors import DataError
from evatune.finetune.tasks.rl.simulator import (
    ACTIONS,
    MAX_STEPS,
    Episode,
    Simulator,
    load_metaworld,
    seed_for,
)
from evatune.loading.cache import build_once
from evatune.utils.progress import Display

_NOISE = 0.2
_KEYS = ("states", "actions", "labels")

Steps = dict[str, np.ndarray]


def demonstrations(task: str, purpose: int, count: int) -> dict[str, Tensor]:
    """Return successful episodes of the task's expert, up to the first step that succeeds.

    They are built once and kept. Noise in the actions taken leads to states from which the expert
    recovers; the labels are without it (Laskey et al. 2017, DART).

    Args:
        purpose: TRAIN or TEST.

    Returns:
        states (steps, 39), actions (steps, 4), labels (steps, 4), lengths (episodes,).
    """
    library = load_metaworld()
    settings = {"version": 3, "task": task, "purpose": purpose, "count": count, "noise": _NOISE}

    def build(progress: Display) -> dict[str, Tensor]:
        episodes = _successful_episodes(library, task, purpose, count, progress)
        lengths = [len(episode["states"]) for episode in episodes]
        tensors = {
            key: torch.from_numpy(np.concatenate([episode[key] for episode in episodes]))
            for key in _KEYS
        }
        return tensors | {"lengths": torch.tensor(lengths, dtype=torch.long, device="cpu")}

    title = f"playing the expert of {task}"
    return build_once(f"metaworld-{task}", settings, build, title, "episodes")


def _successful_episodes(
    library: Any, task: str, purpose: int, count: int, progress: Display
) -> list[Steps]:
    episodes: list[Steps] = []
    number = 0
    with closing(Simulator(task)) as simulator:
        while len(episodes) < count:
            if number > 10 * count + 100:
                raise DataError(
                    f"the expert of task {task!r} succeeds too seldom: {len(episodes)} of {number}"
                    " episodes"
                )
            seed = seed_for(purpose, number)
            policy = library.policies.ENV_POLICY_MAP[f"{task}-v3"]()
            steps = _expert_steps(policy, simulator.episode(seed), np.random.default_rng(seed))
            number += 1
            if steps is not None:
                episodes.append(steps)
            progress.update(len(episodes), count)
    return episodes


def _expert_steps(policy: Any, episode: Episode, noise: np.random.Generator) -> Steps | None:
    """Return what the expert sees and does in the episode; None if it does not succeed."""
    steps: dict[str, list[np.ndarray]] = {key: [] for key in _KEYS}
    for _ in range(MAX_STEPS):
        with warnings.catch_warnings():
            # of actions beyond ±1
            warnings.filterwarnings("ignore", message="Constant", category=UserWarning)
            label = np.clip(policy.get_action(episode.state), -1, 1)
        action = np.clip(label + noise.normal(0, _NOISE, ACTIONS), -1, 1)
        for key, value in zip(_KEYS, (episode.state, action, label), strict=True):
            steps[key].append(value.astype(np.float32))
        episode.step(action.astype(np.float32))
        if episode.success:
            return {key: np.stack(values) for key, values in steps.items()}
    return None
