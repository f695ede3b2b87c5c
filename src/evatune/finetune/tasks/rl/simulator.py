"""Meta-World: its tasks, its environments, and which seeds are for what.

A seed of an environment is a goal (or the place of an object): episodes with equal seeds have equal
goals. Demonstrations of each part and episodes that the model plays never share a seed.
"""

from __future__ import annotations

import copy
import ctypes.util
import os
import sys
from typing import Any

import numpy as np

from evatune.errors import DataError, MissingExtraError
from evatune.utils.extras import extras

# CW10 of Continual World (Wołczyk et al. 2021); the checkpoint saw none of them.
CW10 = (
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
# The other forty of Meta-World's fifty tasks, which the paper pre-trains on.
MT40 = (
    "assembly",
    "basketball",
    "bin-picking",
    "box-close",
    "button-press",
    "button-press-topdown",
    "button-press-topdown-wall",
    "button-press-wall",
    "coffee-button",
    "coffee-pull",
    "coffee-push",
    "dial-turn",
    "disassemble",
    "door-close",
    "door-lock",
    "door-open",
    "door-unlock",
    "drawer-close",
    "drawer-open",
    "faucet-open",
    "hand-insert",
    "handle-press",
    "handle-pull",
    "handle-pull-side",
    "lever-pull",
    "peg-insert-side",
    "pick-out-of-hole",
    "pick-place",
    "pick-place-wall",
    "plate-slide",
    "plate-slide-back",
    "plate-slide-back-side",
    "plate-slide-side",
    "reach",
    "reach-wall",
    "soccer",
    "stick-push",
    "sweep",
    "sweep-into",
    "window-open",
)
STATES, ACTIONS = 39, 4  # numbers in a state, in an action
MAX_STEPS = 200  # of an episode; experts need 40 to 140
# Purposes of an episode; a seed belongs to one of them.
TRAIN, VALIDATION, TEST, VALIDATION_PLAY, PLAY = range(5)
_FIRST_SEED = 100_000  # pre-training had those below


def seed_for(purpose: int, number: int) -> int:
    """Return the seed of an episode: what it is for, and its number among those.

    Args:
        purpose: TRAIN, VALIDATION or TEST for demonstrations, VALIDATION_PLAY or PLAY (at the
            test) for what the policy plays.
    """
    return _FIRST_SEED + 5 * number + purpose


def load_metaworld() -> Any:
    """Return the package metaworld.

    Raises MissingExtraError where it is missing, DataError where it cannot be imported.
    """
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and ctypes.util.find_library("EGL"):
        # read when mujoco is imported; its own default needs a display
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        with extras("a robot task"):
            import metaworld
            import metaworld.policies
    except MissingExtraError:
        raise
    except ImportError as error:  # such as a library of the system that MuJoCo wants
        raise DataError(
            f"robot tasks need Meta-World, which cannot be imported ({error}); install it again"
            " with: pip install --force-reinstall 'evatune[rl]'"
        ) from error
    return metaworld


class Simulator:
    """A task of Meta-World, whose episodes share one compiled world.

    Compiling costs as much as hundreds of steps, and a world takes 20 MB.
    """

    def __init__(self, task: str) -> None:
        environments = load_metaworld().env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        self._world = environments[f"{task}-v3-goal-observable"](seed=0)
        # Both serve the shaped reward alone, which nobody reads, and take most of a step: they walk
        # all contacts in Python. No success depends on them.
        self._world._gripper_caging_reward = lambda *_, **__: 0.0
        self._world.touching_object = lambda *_: False
        self._world.seeded_rand_vec = True

    def episode(self, seed: int) -> Episode:
        """Begin an episode. Its goal belongs to the seed and is part of the state."""
        world = self._world
        world._freeze_rand_vec = False  # a goal of its own
        world.seed(seed)
        state, _ = world.reset()
        twin = object.__new__(type(world))  # deepcopy would compile it anew
        shared = {
            id(world.model): world.model,
            id(world.data): copy.copy(world.data),
            id(world.mujoco_renderer): None,
        }
        twin.__dict__ = copy.deepcopy(world.__dict__, shared)
        twin._freeze_rand_vec = True
        return Episode(twin, state)

    def close(self) -> None:
        self._world.close()


class Episode:
    """An episode under way.

    Attributes:
        state: what the policy sees, (39,).
        success: the task is done.
    """

    def __init__(self, env: Any, state: np.ndarray) -> None:
        self.env, self.state, self.success = env, state, False
        # Where a reset puts furniture and marks: the one part of the shared model that it changes.
        self._places = (env.model.body_pos.copy(), env.model.site_pos.copy())

    def step(self, action: np.ndarray) -> None:
        """Take an action (4,), within ±1."""
        model = self.env.model
        model.body_pos[:], model.site_pos[:] = self._places
        self.state, _, _, _, info = self.env.step(action)
        self.success = bool(info["success"])
