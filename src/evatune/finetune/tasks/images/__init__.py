"""Image classification. To add a task: a file beside these, and a line in `tasks`."""

from evatune.finetune.tasks.images.domain import DOMAIN, prepare
from evatune.finetune.tasks.images.tasks import TASKS

__all__ = ["DOMAIN", "TASKS", "prepare"]
