"""The registry of tasks of image classification."""

from __future__ import annotations

from evatune.finetune.tasks.images import (
    counting,
    digits,
    fonts,
    location,
    orientation,
    search,
    three,
)
from evatune.finetune.tasks.images.base import ImageTask

_MODULES = (digits, location, orientation, counting, fonts, three)
_ALL = (*(module.TASK for module in _MODULES), search.TRIANGLES, search.SQUARES, search.RINGS)
TASKS: dict[str, ImageTask] = {task.name: task for task in _ALL}
