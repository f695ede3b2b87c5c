"""Reinforcement learning: robot tasks of Meta-World, a Decision Transformer, and its success.

Scripted experts show the task in a few episodes; the model imitates them, and is evaluated in the
simulator on goals that no demonstration had.
"""

from evatune.finetune.tasks.rl.domain import DOMAIN, prepare
from evatune.finetune.tasks.rl.scenarios import TASKS

__all__ = ["DOMAIN", "TASKS", "prepare"]
