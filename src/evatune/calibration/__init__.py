"""The calibration: settings, loop, stop rule, record and file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evatune.calibration.config import CalibrationConfig
from evatune.calibration.status import Status
from evatune.utils.lazy import names_from

if TYPE_CHECKING:
    from evatune.calibration.checkpoint import Checkpoint
    from evatune.calibration.progress import Progress
    from evatune.calibration.result import Calibration

__all__ = ["Calibration", "CalibrationConfig", "Checkpoint", "Progress", "Status"]

# These need torch, and `--help` needs the settings.
__getattr__ = names_from(
    __name__,
    {
        "Calibration": "calibration.result",
        "Checkpoint": "calibration.checkpoint",
        "Progress": "calibration.progress",
    },
)
