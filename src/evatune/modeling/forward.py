"""Calls a model with a batch, by the default rule, on the right device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from evatune.errors import DataError, EvatuneError
from evatune.modeling.batches import fault_of, map_tensors
from evatune.modeling.wrappers import base_model

ForwardFunction = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model by the default rule.

    A mapping or dataclass gives keywords, a tuple positions, anything else is one argument.

    Raises:
        DataError: the model fails, and what was given looks like no batch.
        Whatever else the model raises, with a note about the rule where it may be why.
    """
    try:
        if isinstance(batch, Mapping) and not _takes_mapping(model, batch):
            return model(**batch)
        if is_dataclass(batch) and not isinstance(batch, type):
            names = [field.name for field in fields(batch)]
            return model(**{name: getattr(batch, name) for name in names})
        if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
            return model(*batch)
        return model(batch)
    except EvatuneError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        fault = fault_of(batch, base_model(model))
        if fault is not None:
            raise DataError(fault) from error
        if not isinstance(error, (RuntimeError, IndexError)):
            error.add_note(
                f"evatune called the model with a batch of type {type(batch).__name__} by its"
                " default rule (mapping → keywords, tuple → positions). If that is not how this"
                " model is called, pass forward=lambda model, batch: …"
            )
        raise


def _takes_mapping(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a mapping is a model's one argument, whose name is none of the keys."""
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if first is None or first.kind not in kinds or first.default is not first.empty:
        return False
    return first.name not in batch


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Return the batch with its tensors on `device`, in containers of its own.

    Tensors made under `torch.inference_mode()` are copied: outside of it a model could not write to
    them.
    """

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor if device is None else tensor.to(device)
        return tensor.clone() if tensor.is_inference() else tensor

    return map_tensors(batch, moved)


def model_device(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter that has data, to which batches go."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), None)
