"""A calibration before its first batch, for the tests of its parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from evatune import CalibrationConfig
from evatune.calibration.batches import Step
from evatune.calibration.options import RunOptions
from evatune.calibration.state import CalibrationState
from evatune.capture import find_target_layers
from evatune.distributed.group import ProcessGroup


def new_state(model: nn.Module, options: RunOptions) -> CalibrationState:
    """Return the state of a run of one process in which nothing has been seen."""
    config = CalibrationConfig(rank=2, sketch="exact", tolerance=0).resolved()
    with ProcessGroup.create(False, None, 10) as process_group:
        return CalibrationState(model, find_target_layers(model), config, process_group, options)


def step(batch: Any, number: int = 1, has_batch: bool = True) -> Step:
    return Step(
        number=number,
        batch=batch,
        batch_number=number,
        has_batch=has_batch,
        runs_model=True,
        batches_done=number,
        refresh_due=False,
        is_last=False,
    )
