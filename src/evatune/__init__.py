"""evatune: start a LoRA adapter from what the data says: which directions, how many, how sure."""

from __future__ import annotations

from evatune.utils.lazy import names_from
from evatune.version import __version__

TYPE_CHECKING = False  # true for type checkers; typing itself takes longer to load than all of this

if TYPE_CHECKING:
    from evatune.api import calibrate, initialize
    from evatune.calibration.config import CalibrationConfig
    from evatune.calibration.progress import Progress
    from evatune.calibration.result import Calibration
    from evatune.calibration.status import Status
    from evatune.errors import EvatuneError
    from evatune.ranks.allocation import RankPlan
    from evatune.sketch.spectrum import Spectrum

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

# Loaded when they are asked for: torch takes seconds, in which the command line must hear Ctrl-C.
__getattr__ = names_from(
    __name__,
    {
        "Calibration": "calibration.result",
        "CalibrationConfig": "calibration.config",
        "EvatuneError": "errors",
        "Progress": "calibration.progress",
        "RankPlan": "ranks.allocation",
        "Spectrum": "sketch.spectrum",
        "Status": "calibration.status",
        "calibrate": "api",
        "initialize": "api",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
