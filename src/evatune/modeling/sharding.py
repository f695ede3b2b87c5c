"""Tells weights that are spread over processes, or are not there at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evatune.errors import AdapterError
from evatune.modeling.wrappers import base_modules, base_name


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter that may be in DeepSpeed's shards, which are flat."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_sharded(model: nn.Module) -> bool:
    """Return whether other processes hold parts of this model's weights.

    A forward pass then needs them.
    """
    return any(is_sharded_parameter(parameter) for parameter in model.parameters())


def is_sharded_parameter(parameter: Tensor) -> bool:
    """Return whether a weight is in shards: of FSDP2 (a DTensor), FSDP1 (flat), or ZeRO-3."""
    return any(hasattr(parameter, mark) for mark in ("device_mesh", "_fsdp_flattened", "ds_id"))


def require_weights(model: nn.Module) -> None:
    """Raise an AdapterError for a model whose weights are not there when a layer runs.

    They may be on the meta device, in DeepSpeed's shards that no engine gathers, or split by tensor
    parallelism, whose layers never see them whole. Those that accelerate has offloaded, and brings
    in time, are there; those of adapters, which may be made yet, do not count.
    """
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    missing = None if offloaded else _first_without_data(model)
    if missing is not None:
        raise AdapterError(
            f"{missing} is on the meta device, where there are shapes and no values; load the"
            " weights first (from_pretrained, or to_empty and load_state_dict)"
        )
    split = _first_split(model)
    if split is not None:
        raise AdapterError(
            f"{split} is split by tensor parallelism (parallelize_module, tp_plan), where each"
            " process sees a part of a layer; call evatune.calibrate on a model that is not split,"
            " and evatune.initialize(model, calibration) before it is"
        )
    scattered = any(_is_scattered(parameter) for parameter in model.parameters())
    gathered = any(hasattr(module, "ds_inflight_param_registry") for module in model.modules())
    if scattered and not gathered:
        raise AdapterError(
            "the weights of this model are in the shards of DeepSpeed's zero.Init, and no engine"
            " gathers them; call deepspeed.initialize first and pass its engine, or load the model"
            " outside zero.Init (for a Trainer: before its TrainingArguments(deepspeed=…))"
        )


def _first_without_data(model: nn.Module) -> str | None:
    """Return the name of a parameter of the base model that is on the meta device."""
    for name, module in base_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                return base_name(f"{name}.{key}".lstrip("."))
    return None


def _first_split(model: nn.Module) -> str | None:
    """Return the name of a parameter in parts that no FSDP2 module gathers."""
    if not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return None
    from torch.distributed.fsdp import FSDPModule

    gathered = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", ())
        shards = sum(not placement.is_replicate() for placement in placements)
        if placements and (id(parameter) not in gathered or shards > 1):
            return base_name(name)
    return None


def _is_scattered(parameter: Tensor) -> bool:
    """Return whether DeepSpeed holds a parameter in shards that are not gathered now."""
    status: Any = getattr(parameter, "ds_status", None)
    return getattr(status, "name", "") == "NOT_AVAILABLE"
