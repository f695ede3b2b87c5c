"""Options of a run over batches that are not settings of the calibration: functions and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.progress import ProgressFunction
from evatune.capture.recorder import RowsFunction
from evatune.errors import ConfigError
from evatune.modeling.forward import ForwardFunction
from evatune.modeling.loss import LossFunction
from evatune.schemas import short_repr


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run over batches beside its settings; none of them is recorded.

    Attributes:
        forward, rows, loss, checkpoint: as for `evatune.calibrate`.
        progress: called after each batch; `progress_callback` makes one of "auto".
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

    def __post_init__(self) -> None:
        for name in ("forward", "rows", "loss"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise ConfigError(
                    f"{name} is {short_repr(function)}; give a function, or leave it out"
                )
        if self.checkpoint is not None and not isinstance(self.checkpoint, Checkpoint):
            raise ConfigError(
                f"checkpoint is {short_repr(self.checkpoint)}; give an"
                " evatune.calibration.Checkpoint(path)"
            )


def require_model(model: Any) -> None:
    """Raise a ConfigError for what is no model."""
    if isinstance(model, nn.Module):
        return
    what = f"{short_repr(model)}, a {type(model).__name__}"
    way = "give a torch.nn.Module, such as get_peft_model returns"
    if hasattr(model, "get_train_dataloader"):
        what, way = "a Trainer", "call evatune.initialize(trainer), or give its model and batches"
    raise ConfigError(f"the model is {what}; {way}")


def settings_of(config: CalibrationConfig | None) -> CalibrationConfig:
    """Return the settings, or the default ones for None; ConfigError for anything else."""
    if config is None:
        return CalibrationConfig()
    if not isinstance(config, CalibrationConfig):
        raise ConfigError(
            f"config is {short_repr(config)}, a {type(config).__name__}; give an"
            " evatune.CalibrationConfig, such as CalibrationConfig(center=True)"
        )
    return config
