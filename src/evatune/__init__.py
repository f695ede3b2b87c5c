"""evatune: start a LoRA adapter from what the data says. Which directions, how many in which layer, how sure."""

from __future__ import annotations

from evatune.calibrate import Progress, calibrate
from evatune.calibration import Calibration
from evatune.config import CalibrationConfig
from evatune.errors import EvatuneError
from evatune.initialize import initialize
from evatune.ranks import RankPlan
from evatune.spectrum import Spectrum
from evatune.status import Status
from evatune.version import __version__

__all__ = [
    "Calibration",
    "CalibrationConfig",
    "EvatuneError",
    "Progress",
    "RankPlan",
    "Spectrum",
    "Status",
    "__version__",
    "calibrate",
    "initialize",
]
