"""The calibration: settings, loop, stop rule, record and file."""

from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.options import Progress
from evatune.calibration.result import Calibration
from evatune.calibration.status import Status

__all__ = ["Calibration", "CalibrationConfig", "Checkpoint", "Progress", "Status"]
