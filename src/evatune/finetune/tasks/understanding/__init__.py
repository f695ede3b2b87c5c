"""Language understanding. A corpus or a kind of error is a line in `domain` or `grammar`."""

from evatune.finetune.tasks.understanding.domain import DOMAIN, TASKS, prepare

__all__ = ["DOMAIN", "TASKS", "prepare"]
