"""A model's state while it is watched, and the way back to how it was found."""

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
from evatune.modeling.wrappers import _base, base_name


@contextmanager
def full_precision(device: torch.device | None) -> Iterator[None]:
    """Without autocast, TF32 and their like, under which products on `device` would be in 16 bits
    or few more.

    What is ours is in float32 or better.
    """
    kinds = {"cpu", "cpu" if device is None else device.type}
    with ExitStack() as stack:
        stack.enter_context(_ieee_products())
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Float32 products as they are by default, whatever `torch.set_float32_matmul_precision` was
    told."""
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
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model inside a `PeftModel`, then put every adapter's switch back as it was.

    PEFT's own `disable_adapter` also rewrites `requires_grad`; this touches the one flag that the
    forward pass reads. It lets adapters on the meta device (low_cpu_mem_usage) stand aside as well.
    """
    # Not hasattr(m, …): what a module does not have it looks for at length, and this runs for each
    # batch.
    key = "_disable_adapters"
    switches = [m for m in model.modules() if key in m.__dict__ or hasattr(type(m), key)]
    if any(getattr(m, "merged_adapters", None) for m in switches):
        raise AdapterError(
            "an adapter is merged into the base weights; call unmerge_adapter() first"
        )
    before = [m._disable_adapters for m in switches]
    try:
        for module in switches:
            module._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module._disable_adapters = value


def may_stop_early(model: nn.Module) -> bool:
    """Whether nothing is lost by leaving a forward pass once every watched layer has been called.

    What is left out is the end of the last block, the output embedding and the loss; for a language
    model with a large vocabulary that is much time and most of the memory. Only for transformers'
    own models, whose forward passes have no other effects, and only where nobody else waits for the
    end: no forward hooks, no offloading, no shard of the model on another process.
    """
    if not type(_base(model)).__module__.startswith("transformers.") or is_sharded(model):
        return False
    return not any(
        module._forward_hooks or hasattr(module, "_hf_hook") for module in model.modules()
    )


@contextmanager
def evaluation_state(model: nn.Module) -> Iterator[None]:
    """The base model in evaluation mode inside; modes, adapters and random states as before
    afterwards."""
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
    """Evaluation mode, base weights and no compiled graphs inside; modes and adapters as before
    afterwards.

    Compiled models run uncompiled: with hooks on every layer, which are traced as well, compiling
    takes far longer than a calibration, and its graphs are of no use afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # In evaluation mode torch's own transformer layers would pass their inner linear layers by.
        torch.backends.mha.set_fastpath_enabled(False)
        # Nothing is compiled where the compiler has not been imported.
        eager = (
            torch.compiler.set_stance("force_eager")
            if "torch._dynamo" in sys.modules
            else nullcontext()
        )
        with eager, adapters_off(model):
            for module, _ in modes:
                # In evaluation mode bitsandbytes packs 4-bit weights on a CPU anew, for good, and
                # they train no more.
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


def require_trainable(model: nn.Module) -> None:
    """Raise an AdapterError for parameters through which torch lets no gradient flow."""
    stuck = next(
        (name for name, parameter in model.named_parameters() if parameter.is_inference()), None
    )
    if stuck is not None:
        raise AdapterError(
            f"{base_name(stuck)} was made under torch.inference_mode(), where nothing can be"
            " trained through it; load the model and build its adapter outside of it"
        )
