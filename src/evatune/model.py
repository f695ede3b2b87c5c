"""Running a model of any make: how it is called, what it is made to be meanwhile, and where its weights are."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evatune.batches import fault_of
from evatune.capture.targets import adapted, adapters_off, base_modules, base_name, stood_for
from evatune.errors import AdapterError, DataError, EvatuneError

ForwardFunction = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """The default forward pass: keywords from a mapping or dataclass, positions from a tuple, else one argument.

    Raises:
        DataError: the model fails, and what was given looks like no batch.
        Whatever else the model raises, with a note about the rule where it may be why.
    """
    try:
        if isinstance(batch, Mapping) and not _takes_mapping(model, batch):
            return model(**batch)
        if is_dataclass(batch) and not isinstance(batch, type):
            return model(**{f.name: getattr(batch, f.name) for f in fields(batch)})
        if isinstance(batch, (tuple, list)):
            return model(*batch)
        return model(batch)
    except EvatuneError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        fault = fault_of(batch, _base(model))
        if fault is not None:
            raise DataError(fault) from error
        if not isinstance(error, RuntimeError):
            error.add_note(
                f"evatune called the model with a batch of type {type(batch).__name__} by its default rule (mapping → "
                "keywords, tuple → positions). If that is not how this model is called, pass forward=lambda model, batch: …"
            )
        raise


def _takes_mapping(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a mapping is the one argument of a model, whose first is none of the keys."""
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if first is None or first.kind not in kinds or first.default is not first.empty:
        return False
    return first.name not in batch


def to_device(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on `device`; the caller's containers are not touched.

    Tensors made under `torch.inference_mode()` are copied: outside of it a model could not write to them.
    """
    if isinstance(batch, Tensor):
        batch = batch if device is None else batch.to(device)
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, UserDict):  # transformers' BatchEncoding, whose own `to` would change the caller's
        moved = copy.copy(batch)
        moved.data = {key: to_device(value, device) for key, value in batch.items()}
        return moved
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def may_cut_short(model: nn.Module) -> bool:
    """Whether nothing is lost by leaving a forward pass once every watched layer has been called.

    What is left out is the end of the last block, the output embedding and the loss; for a language model
    with a large vocabulary that is much time and most of the memory. Only for transformers' own models, whose
    forward passes have no other effects, and only where nobody else waits for the end: no forward hooks, no
    offloading, no shard of the model on another process.
    """
    if not type(_base(model)).__module__.startswith("transformers.") or is_sharded(model):
        return False
    return not any(module._forward_hooks or hasattr(module, "_hf_hook") for module in model.modules())


def _base(model: nn.Module) -> nn.Module:
    """The model of the library or the user, inside compiled graphs, FSDP1 and PEFT."""
    inner = stood_for(model)
    if inner is None:
        inner = getattr(model, "get_base_model", lambda: model)()
    return model if inner is model else _base(inner)


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """The base model in evaluation mode inside; modes, adapters and random states as before afterwards."""
    with states_kept(model), as_base(model):
        yield


@contextmanager
def states_kept(model: nn.Module) -> Iterator[None]:
    """Modes and random states are as before afterwards, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, base weights and no compiled graphs inside; modes and adapters as before afterwards.

    Compiled models run uncompiled: with hooks on every layer, which are traced as well, compiling takes far longer
    than a calibration, and its graphs are of no use afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # In evaluation mode torch's own transformer layers would pass their inner linear layers by.
        torch.backends.mha.set_fastpath_enabled(False)
        # Nothing is compiled where the compiler has not been imported.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with eager, adapters_off(model):
            for module, _ in modes:
                # In evaluation mode bitsandbytes packs 4-bit weights on a CPU anew, for good, and they train no more.
                _set_mode(module, "support_avx512bf16_for_cpu" in module.__dict__)
            yield
    finally:
        for module, training in modes:
            _set_mode(module, training)
        torch.backends.mha.set_fastpath_enabled(fast)


def _set_mode(module: nn.Module, training: bool) -> None:
    if module.training != training:  # writing costs much more than reading
        module.training = training


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def model_device(model: nn.Module) -> torch.device | None:
    """Where batches go: the device of the first parameter that has data."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs the other processes, since they hold parts of this model's weights."""
    return any(is_part(parameter) for parameter in model.parameters())


def is_part(parameter: Tensor) -> bool:
    """Of a weight in shards: a DTensor (FSDP2), flat or a view of what is (FSDP1), or one of DeepSpeed's ZeRO-3."""
    return any(hasattr(parameter, mark) for mark in ("device_mesh", "_fsdp_flattened", "ds_id"))


def require_trainable(model: nn.Module) -> None:
    """Raise an AdapterError for parameters through which torch lets no gradient flow."""
    stuck = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if stuck is not None:
        raise AdapterError(
            f"{base_name(stuck)} was made under torch.inference_mode(), where nothing can be trained "
            "through it; load the model and build its adapter outside of it"
        )


def require_weights(model: nn.Module) -> None:
    """Raise an AdapterError for a model that no forward pass can run through, since weights are not there.

    They may be on the meta device, or in DeepSpeed's shards that no engine gathers. Those that accelerate has offloaded,
    and brings in time, are there; those of adapters, which may be made yet, do not count.
    """
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, module in base_modules(model) if not offloaded else ():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                raise AdapterError(
                    f"{base_name(f'{name}.{key}'.lstrip('.'))} is on the meta device, where there are "
                    "shapes and no values; load the weights first (from_pretrained, or to_empty and "
                    "load_state_dict)"
                )
    scattered = any(getattr(getattr(p, "ds_status", None), "name", "") == "NOT_AVAILABLE" for p in model.parameters())
    if scattered and not any(hasattr(module, "ds_inflight_param_registry") for module in model.modules()):
        raise AdapterError(
            "the weights of this model are in the shards of DeepSpeed's zero.Init, and no engine gathers them; call "
            "deepspeed.initialize first and pass its engine, or load the model outside zero.Init (for a Trainer: before "
            "its TrainingArguments(deepspeed=…))"
        )


def describe(model: nn.Module) -> str:
    """Class and, where it is known, name or path of the weights; of the adapted model inside if there is one."""
    inner = _base(adapted(model))
    source = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    # fully_shard puts a class of its own before the model's.
    kind = next(kind.__name__ for kind in type(inner).__mro__ if not kind.__name__.startswith("FSDP"))
    return f"{kind} {source}".strip()
