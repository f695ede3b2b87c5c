"""How a robot sees and moves, where it is not the one of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evatune.finetune.tasks.rl.simulator import ACTIONS, STATES

_POSITIONS = (0, 4, 11, 18, 22, 29, 36)  # where x, y, z begin in a state


@dataclass(frozen=True)
class Robot:
    """A change of coordinates between the simulator and the policy; both matrices are orthogonal.

    Attributes:
        state: what the policy sees is state (39, 39) times what the simulator says.
        action: what the policy wants is action (4, 4) times what the simulator is told.
    """

    state: Tensor
    action: Tensor

    def sees(self, states: Tensor) -> Tensor:
        """Return the policy's states (…, 39) of the simulator's."""
        return states @ self.state.T

    def wants(self, actions: Tensor) -> Tensor:
        """Return the policy's actions (…, 4) of the simulator's."""
        return actions @ self.action.T

    def moves(self, actions: Tensor) -> Tensor:
        """Return the simulator's actions (…, 4), within ±1, of the policy's."""
        return (actions @ self.action).clamp(-1, 1)


SAWYER = Robot(
    torch.eye(STATES, dtype=torch.float32, device="cpu"),
    torch.eye(ACTIONS, dtype=torch.float32, device="cpu"),
)


def of_frame(frame: Tensor) -> Robot:
    """Return a robot whose x, y and z are frame (3, 3) times the simulator's.

    Positions turn in the state (hand, two objects, the same a step ago, goal), and so do the first
    three numbers of an action. What belongs to no direction in space stays: openings of the gripper
    and quaternions.
    """
    state, action = (
        torch.eye(STATES, dtype=torch.float32, device="cpu"),
        torch.eye(ACTIONS, dtype=torch.float32, device="cpu"),
    )
    for first in _POSITIONS:
        state[first : first + 3, first : first + 3] = frame
    action[:3, :3] = frame
    return Robot(state, action)


def with_sensors_in_order(order: Sequence[int]) -> Robot:
    """Return a robot that reports the numbers of the state in another order."""
    return Robot(
        torch.eye(STATES, dtype=torch.float32, device="cpu")[list(order)],
        torch.eye(ACTIONS, dtype=torch.float32, device="cpu"),
    )
