"""The registry of tasks of image classification."""

from __future__ import annotations

from evatune.finetune.tasks.images import counting, digits, fonts, location, orientation, search
from evatune.finetune.tasks.images.base import ImageTask

_MODULES = (digits, location, orientation, counting, fonts)
_ALL = (*(module.TASK for module in _MODULES), search.TRIANGLES, search.LETTERS)
TASKS: dict[str, ImageTask] = {task.name: task for task in _ALL}
