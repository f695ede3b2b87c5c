"""The tasks of this domain: what is to be done, and by which robot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from evatune.finetune.tasks.rl.robots import SAWYER, Robot, of_frame, with_sensors_in_order
from evatune.finetune.tasks.rl.simulator import CW10, MT40, STATES

# Three of CW10 at which a policy with a new head alone seldom succeeds. On faucet-close,
# handle-press-side and window-close all methods score alike.
_PUSHING = ("push", "push-back", "push-wall")


@dataclass(frozen=True)
class Scenario:
    """Tasks of Meta-World that one policy learns together, in turn, and the robot that it moves."""

    tasks: tuple[str, ...]
    robot: Robot = SAWYER


def _turned() -> Robot:
    """Return a robot mounted at a right angle: its x is the simulator's -y."""
    return of_frame(
        torch.tensor(
            [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float32, device="cpu"
        )
    )


def _tilted() -> Robot:
    """Return a robot whose frame is turned about a random axis, so that up is not up."""
    random = np.random.default_rng(7).normal(size=(3, 3))
    return of_frame(torch.from_numpy(np.linalg.qr(random)[0]).float())


def _shuffled() -> Robot:
    """Return a robot that reports its sensors in a random order."""
    return with_sensors_in_order(np.random.default_rng(7).permutation(STATES).tolist())


SCENARIOS = {task: Scenario((task,)) for task in CW10} | {
    "cw10": Scenario(CW10),
    "mt40": Scenario(MT40),
    "pushing": Scenario(_PUSHING),
    "turned": Scenario(_PUSHING, _turned()),
    "tilted": Scenario(_PUSHING, _tilted()),
    "mirrored": Scenario(
        _PUSHING,
        of_frame(torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float32, device="cpu"))),
    ),
    "shuffled": Scenario(_PUSHING, _shuffled()),
}
TASKS = tuple(SCENARIOS)
