"""The processes that a launcher started, together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from accelerate.state import PartialState

from evatune.distributed.group import ProcessGroup
from evatune.errors import ProcessError
from evatune.utils.launcher import processes
from evatune.version import __version__

_LIBRARIES = ("torch", "transformers", "peft", "accelerate")
_PLACE = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as launchers tell it
_TIMEOUT = 300.0  # seconds in which all processes must have loaded their libraries


@contextmanager
def launched() -> Iterator[ProcessGroup]:
    """Yield the group of all processes that a launcher started, or of this one alone.

    What one of them raises between two messages ends all of them. torch's own group stays open.

    Raises ProcessError where some do not come, or have other versions of the libraries.
    """
    if processes() == 1:
        yield ProcessGroup()
        return
    missing = [name for name in _PLACE if name not in os.environ]
    if missing:
        raise ProcessError(
            f"WORLD_SIZE says that this is one of {processes()} processes, but {missing[0]} is not"
            " set; start them by torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    PartialState(cpu=not torch.accelerator.is_available())  # NCCL on GPUs, gloo without
    with ProcessGroup.create(True, None, _TIMEOUT) as group:
        installed = {name: version(name) for name in _LIBRARIES}
        group.require_equal({"evatune": __version__, **installed}, "have the same libraries")
        yield group
