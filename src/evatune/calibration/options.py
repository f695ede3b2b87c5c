"""Options of a run over batches that are not settings of the calibration: functions and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from evatune.calibration.checkpoint import Checkpoint
from evatune.capture.recorder import RowsFunction
from evatune.modeling.forward import ForwardFunction
from evatune.modeling.loss import LossFunction


@dataclass(frozen=True)
class Progress:
    """The state of a run after a batch, as a `progress` callback receives it."""

    batch: int  # batches done
    max_batches: int
    rows: int  # most rows any layer has seen
    settled: int  # layers whose directions have settled, as of the last check
    layers: int


ProgressFunction = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run over batches beside its settings; none of them is recorded.

    Attributes:
        forward, rows, loss, progress, checkpoint: as for `evatune.calibrate`.
        caps: ranks that the stop rule's trial redistribution keeps to, as `allocate` does.
        active: from a batch to the (B, T) positions at which the adapter acts; None: at all.
    """

    forward: ForwardFunction | None = None
    rows: RowsFunction | None = None
    loss: LossFunction | None = None
    progress: ProgressFunction | None = None
    checkpoint: Checkpoint | None = None
    caps: Mapping[str, int] = field(default_factory=dict)
    active: Callable[[Any], Tensor] | None = None
