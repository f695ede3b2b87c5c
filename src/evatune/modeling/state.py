"""Puts a model into the state in which it is calibrated, and back as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from evatune.errors import AdapterError
from evatune.modeling.sharding import is_sharded
from evatune.modeling.wrappers import base_model, base_name


@contextmanager
def full_precision(device: torch.device | None) -> Iterator[None]:
    """Turn off autocast, TF32 and the like, so that products are in float32 or better.

    Args:
        device: where the products are computed, besides the CPU.
    """
    device_types = {"cpu"}
    if device is not None:
        device_types.add(device.type)
    with ExitStack() as stack:
        stack.enter_context(_ieee_products())
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Compute float32 products, and sums of 16-bit ones, in full, whatever torch was told."""
    with _float32_sums():
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
            legacy = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(legacy)
            return
        libraries: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
        backends: list[Any] = [library.matmul for library in libraries]
        before = [_own_precision(backend) for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


def _own_precision(backend: Any) -> str:
    """Return what was set for these products; "none" where they go by a setting for more."""
    shown: str = backend.fp32_precision
    backend.fp32_precision = "none"
    inherited = backend.fp32_precision
    backend.fp32_precision = shown
    return "none" if inherited == shown else shown


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Add products of float16 numbers up in float32."""
    backend: Any = torch.backends.cuda.matmul
    before = getattr(backend, "allow_fp16_accumulation", False)  # none before torch 2.7
    if before:
        backend.allow_fp16_accumulation = False
    try:
        yield
    finally:
        if before:
            backend.allow_fp16_accumulation = True


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model inside a `PeftModel`, then put every adapter's switch back as it was.

    PEFT's own `disable_adapter` also rewrites `requires_grad`; this touches the one flag that the
    forward pass reads. It lets adapters on the meta device (low_cpu_mem_usage) stand aside as well.
    """
    switches = [module for module in model.modules() if _has_adapter_switch(module)]
    if any(getattr(module, "merged_adapters", None) for module in switches):
        raise AdapterError(
            "an adapter is merged into the base weights; call unmerge_adapter() first"
        )
    before = [module._disable_adapters for module in switches]
    try:
        for module in switches:
            module._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module._disable_adapters = value


def _has_adapter_switch(module: nn.Module) -> bool:
    """Return whether a module has `_disable_adapters`.

    Not by hasattr(module, …): what a module does not have it looks for at length, and this runs for
    each batch.
    """
    key = "_disable_adapters"
    return key in module.__dict__ or hasattr(type(module), key)


def may_stop_early(model: nn.Module) -> bool:
    """Return whether a forward pass may end once every watched layer has been called.

    What is left out is the end of the last block, the output embedding and the loss; for a language
    model with a large vocabulary that is much time and most of the memory. Only for transformers'
    own models, whose forward passes have no other effects, and only where nobody else waits for the
    end: no forward hooks, no offloading, no shard of the model on another process.
    """
    if not type(base_model(model)).__module__.startswith("transformers.") or is_sharded(model):
        return False
    return not any(
        module._forward_hooks or hasattr(module, "_hf_hook") for module in model.modules()
    )


@contextmanager
def evaluation_state(model: nn.Module) -> Iterator[None]:
    """Run the base model in evaluation mode; put modes, adapters and random states back."""
    with preserve_model_state(model), as_base(model):
        yield


@contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Put modes and random states back as they were, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=cuda_devices(model)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


PACKS_4_BITS = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' layers: whether they pack weights in evaluation mode on a CPU."""


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Run the base model in evaluation mode, uncompiled; put modes and adapters back.

    Compiled models run uncompiled: with hooks on every layer, which are traced as well, compiling
    takes far longer than a calibration, and its graphs are of no use afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # In evaluation mode torch's own transformer layers would pass their inner linear layers by.
        torch.backends.mha.set_fastpath_enabled(False)
        # Nothing is compiled where the compiler has not been imported.
        uncompiled: Any = nullcontext()
        if "torch._dynamo" in sys.modules:
            uncompiled = torch.compiler.set_stance("force_eager")
        with uncompiled, adapters_off(model):
            for module, _ in modes:
                # In evaluation mode bitsandbytes packs 4-bit weights on a CPU anew, for good, and
                # they train no more.
                _set_mode(module, PACKS_4_BITS in module.__dict__)
            yield
    finally:
        for module, training in modes:
            _set_mode(module, training)
        torch.backends.mha.set_fastpath_enabled(fast)


def _set_mode(module: nn.Module, training: bool) -> None:
    if module.training != training:  # writing costs much more than reading
        module.training = training


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the indices of the GPUs that hold parameters, whose generators a call may move."""
    devices = {parameter.device for parameter in model.parameters()}
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


def require_trainable(model: nn.Module) -> None:
    """Raise an AdapterError for parameters through which torch lets no gradient flow."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise AdapterError(
                f"{base_name(name)} was made under torch.inference_mode(), where nothing can be"
                " trained through it; load the model and build its adapter outside of it"
            )
