"""Every error that evatune raises on purpose.

    EvatuneError
    ├── ConfigError        an option is out of its range, or contradicts another one
    │   └── BudgetError    the layers cannot take up the rank budget
    ├── TargetError        targets match no layer, or a layer type that is not supported
    ├── DataError          batches, texts or files cannot be used
    │   └── NoBatchError   data without a single batch
    ├── LayerError         layers whose activations give nothing to start an adapter from
    ├── RecordError        a calibration or adapter file is damaged, or not ours
    ├── AdapterError       a model or adapter is in a state that cannot be initialized
    ├── MissingExtraError  a library that one of evatune's extras brings is not installed
    └── ProcessError       one of several processes failed, or was lost

MissingExtraError is a ModuleNotFoundError as well, ProcessError a RuntimeError, and all others that
stand under the root are ValueErrors.
Every message says what came, what is allowed and what to try, and names the layer or the option.
"""

from __future__ import annotations


class EvatuneError(Exception):
    """Root of every error that evatune raises on purpose."""


class ConfigError(EvatuneError, ValueError):
    """An option is out of its range, or contradicts another one."""


class BudgetError(ConfigError):
    """The layers cannot take up the rank budget that was asked for."""


class TargetError(EvatuneError, ValueError):
    """The targets match no layer, or a layer of a type that is not supported."""


class DataError(EvatuneError, ValueError):
    """Batches, texts or files cannot be used."""


class NoBatchError(DataError):
    """The data held not a single batch."""


class LayerError(EvatuneError, ValueError):
    """Layers were calibrated without a usable result; the message lists them with advice."""


class RecordError(EvatuneError, ValueError):
    """A calibration or adapter file is damaged, or not one of ours."""


class AdapterError(EvatuneError, ValueError):
    """The model or its adapter is in a state that cannot be initialized."""


class MissingExtraError(EvatuneError, ModuleNotFoundError):
    """A library that one of evatune's extras brings is not installed."""


class ProcessError(EvatuneError, RuntimeError):
    """One of several processes failed, was lost, or calibrates something else."""
