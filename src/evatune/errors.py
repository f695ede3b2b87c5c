"""Every error that evatune raises on purpose.

    EvatuneError
    ├── ConfigError        an option out of its range, or options that contradict each other   (also
    ValueError) │   └── BudgetError    a rank budget that the layers cannot take up
    ├── TargetError        targets that match no layer, or a layer kind that is not supported
    (also ValueError) ├── DataError          batches, texts or files that cannot be used
    (also ValueError) │   └── NoBatchError   data without a single batch
    ├── LayerError         layers whose activations give nothing to start an adapter from      (also
    ValueError) ├── RecordError        a calibration or adapter file that is damaged or not ours
    (also ValueError) ├── AdapterError       a model or adapter in a state that cannot be
    initialised            (also ValueError) └── ProcessError       one of several processes that
    work together failed or was lost      (also RuntimeError)

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
    """The targets match no layer, or a layer whose kind is not supported."""


class DataError(EvatuneError, ValueError):
    """Batches, texts or files cannot be used."""


class NoBatchError(DataError):
    """Not one batch came."""


class LayerError(EvatuneError, ValueError):
    """Layers were calibrated without a usable result; the message lists them with advice."""


class RecordError(EvatuneError, ValueError):
    """A calibration or adapter file is damaged, or not one of ours."""


class AdapterError(EvatuneError, ValueError):
    """The model or its adapter is in a state that cannot be initialised."""


class ProcessError(EvatuneError, RuntimeError):
    """One of several processes that calibrate together failed, was lost, or works on something
    else."""
