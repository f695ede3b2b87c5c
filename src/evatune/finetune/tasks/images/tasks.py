"""The registry of tasks of image classification."""

from __future__ import annotations

from evatune.finetune.tasks.images import counting, digits, fonts, location, orientation
from evatune.finetune.tasks.images.base import ImageTask

_MODULES = (digits, location, orientation, counting, fonts)
TASKS: dict[str, ImageTask] = {module.TASK.name: module.TASK for module in _MODULES}
