"""evatune: start a LoRA adapter from what the data says. Which directions, how many in which layer, how sure."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from evatune.version import __version__

TYPE_CHECKING = False  # for type checkers it is true; typing itself takes longer to load than all of this

if TYPE_CHECKING:
    from typing import Any

    from evatune.calibrate import Progress, calibrate
    from evatune.calibration import Calibration
    from evatune.config import CalibrationConfig
    from evatune.errors import EvatuneError
    from evatune.initialize import initialize
    from evatune.ranks import RankPlan
    from evatune.spectrum import Spectrum
    from evatune.status import Status

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

# Loaded when they are asked for: torch takes seconds, in which the command line must already hear Ctrl-C.
_HOMES = {
    "Calibration": "calibration",
    "CalibrationConfig": "config",
    "EvatuneError": "errors",
    "Progress": "calibrate",
    "RankPlan": "ranks",
    "Spectrum": "spectrum",
    "Status": "status",
    "calibrate": "calibrate",
    "initialize": "initialize",
}


class _Package(ModuleType):
    """Keeps a function where the import system would put the module of its name."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'evatune' has no attribute {name!r}")
        value = getattr(import_module(f"evatune.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in _HOMES else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
