"""Facts about this process that a launcher gives, such as torchrun or accelerate launch."""

from __future__ import annotations

import os

from evatune.errors import ConfigError


def processes() -> int:
    """Return as how many processes a launcher started this program; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the process that writes files and speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def require_alone(command: str) -> None:
    """Raise a ConfigError in a process that a launcher started as one of several."""
    if processes() > 1:
        raise ConfigError(
            f"this is one of {processes()} processes, and {command} is for one; start it without"
            " torchrun or accelerate launch"
        )
