"""Meta-World: its tasks, its environments, and which seeds are for what.

A seed of an environment is a goal (or the place of an object): episodes with equal seeds have equal
goals. Demonstrations to train on, demonstrations to evaluate on and episodes that the model plays
never share a seed.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from typing import Any

from evatune.errors import DataError

# CW10 of Continual World (Wołczyk et al. 2021). To add a task of Meta-World, name it here.
TASKS = (
    "hammer",
    "push-wall",
    "faucet-close",
    "push-back",
    "stick-pull",
    "handle-press-side",
    "push",
    "shelf-place",
    "window-close",
    "peg-unplug-side",
)
STATES, ACTIONS = 39, 4  # numbers in a state, in an action
MAX_STEPS = 200  # of an episode; experts need 40 to 140
# Purposes of an episode; a seed belongs to one of them. The last two begin beyond the first million
# episodes of the others.
TRAIN, TEST, PLAY = range(3)
VALIDATION, VALIDATION_PLAY = (
    3_000_000,
    3_000_001,
)


def seed_for(purpose: int, number: int) -> int:
    """Return the seed of an episode: TRAIN or another purpose, and its number among those."""
    return 3 * number + purpose


def load_metaworld() -> Any:
    """Return the package metaworld. Raises DataError where it is missing."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and ctypes.util.find_library("EGL"):
        # read when mujoco is imported; its own default needs a display
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import metaworld
        import metaworld.policies
    except ImportError as error:
        raise DataError(
            f"robot tasks need Meta-World, which cannot be imported ({error}); install it with: pip"
            " install 'evatune[rl]'"
        ) from error
    return metaworld


def environment(task: str, seed: int) -> Any:
    """Return the simulator of a task, to be closed.

    Its goal belongs to the seed and is part of the state.
    """
    environments = load_metaworld().env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    return environments[f"{task}-v3-goal-observable"](seed=seed)
