"""evatune: start a LoRA adapter from what the data says: which directions, how many, how sure."""

from __future__ import annotations

from importlib import import_module

from evatune.version import __version__

TYPE_CHECKING = False  # true for type checkers; typing itself takes longer to load than all of this

if TYPE_CHECKING:
    from typing import Any

    from evatune.api import calibrate, initialize
    from evatune.calibration.config import CalibrationConfig
    from evatune.calibration.options import Progress
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
_HOMES = {
    "Calibration": "calibration.result",
    "CalibrationConfig": "calibration.config",
    "EvatuneError": "errors",
    "Progress": "calibration.options",
    "RankPlan": "ranks.allocation",
    "Spectrum": "sketch.spectrum",
    "Status": "calibration.status",
    "calibrate": "api",
    "initialize": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'evatune' has no attribute {name!r}")
    value = getattr(import_module(f"evatune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
