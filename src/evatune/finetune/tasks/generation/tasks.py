"""The registry of tasks of language generation."""

from __future__ import annotations

from evatune.finetune.tasks.generation import (
    arithmetic,
    clock,
    code,
    commonsense,
    dates,
    numbers,
    reviews,
)
from evatune.finetune.tasks.generation.base import GenerationTask

_MODULES = (arithmetic, dates, numbers, clock, commonsense, code, reviews)
TASKS: dict[str, GenerationTask] = {module.TASK.name: module.TASK for module in _MODULES}
