"""Models whose weights are spread over processes, or are not there at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evatune.errors import AdapterError
from evatune.modeling.wrappers import base_modules, base_name


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of a parameter that may be in DeepSpeed's shards, which are flat."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs the other processes, since they hold parts of this model's
    weights."""
    return any(is_sharded_parameter(parameter) for parameter in model.parameters())


def is_sharded_parameter(parameter: Tensor) -> bool:
    """Of a weight in shards: a DTensor (FSDP2), flat or a view of what is (FSDP1), or one of
    DeepSpeed's ZeRO-3."""
    return any(hasattr(parameter, mark) for mark in ("device_mesh", "_fsdp_flattened", "ds_id"))


def require_weights(model: nn.Module) -> None:
    """Raise an AdapterError for a model that no forward pass can run through, since weights are not
    there.

    They may be on the meta device, or in DeepSpeed's shards that no engine gathers. Those that
    accelerate has offloaded, and brings in time, are there; those of adapters, which may be made
    yet, do not count.
    """
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, module in base_modules(model) if not offloaded else ():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                raise AdapterError(
                    f"{base_name(f'{name}.{key}'.lstrip('.'))} is on the meta device, where there"
                    " are shapes and no values; load the weights first (from_pretrained, or"
                    " to_empty and load_state_dict)"
                )
    scattered = any(
        getattr(getattr(p, "ds_status", None), "name", "") == "NOT_AVAILABLE"
        for p in model.parameters()
    )
    if scattered and not any(
        hasattr(module, "ds_inflight_param_registry") for module in model.modules()
    ):
        raise AdapterError(
            "the weights of this model are in the shards of DeepSpeed's zero.Init, and no engine"
            " gathers them; call deepspeed.initialize first and pass its engine, or load the model"
            " outside zero.Init (for a Trainer: before its TrainingArguments(deepspeed=…))"
        )
