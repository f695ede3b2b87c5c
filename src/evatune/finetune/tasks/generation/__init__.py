"""Language generation. To add a task: a file beside these, and a line in `tasks`."""

from evatune.finetune.tasks.generation.domain import DOMAIN, prepare
from evatune.finetune.tasks.generation.tasks import TASKS

__all__ = ["DOMAIN", "TASKS", "prepare"]
