"""The registry of tasks of language generation."""

from __future__ import annotations

from evatune.finetune.tasks.generation import arithmetic, code, commonsense, reviews
from evatune.finetune.tasks.generation.base import GenerationTask

_MODULES = (arithmetic, commonsense, code, reviews)
TASKS: dict[str, GenerationTask] = {module.TASK.name: module.TASK for module in _MODULES}
