"""Looks through what is around a model or layer: DDP, FSDP, torch.compile, DeepSpeed, PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from evatune.layers import PEFT_PREFIX

# The only child of the modules that torch.compile, FSDP1 and torch's activation checkpointing put
# around others.
_WRAPPER_KEYS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Where PEFT keeps what it wraps: below an adapter, or beside a copy that is trained.
_PEFT_KEYS = ("base_layer", "original_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel or DeepSpeed's engine."""
    parallel = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    if parallel or is_engine(model):
        return unwrapped(model.get_submodule("module"))
    inside = wrapped_module(model)  # the wrapper itself may be compiled
    if inside is None or unwrapped(inside) is inside:
        return model
    return unwrapped(inside)


def adapted_inside(model: nn.Module) -> dict[str, nn.Module]:
    """Return path → model that carries adapters, none inside another; "" is the model itself."""
    carriers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in carriers)
        if not inside and carries_adapters(module):
            carriers[path] = module
    return carriers


def carries_adapters(module: nn.Module) -> bool:
    """Return whether PEFT has put adapters into this model."""
    return isinstance(getattr(module, "peft_config", None), dict)


def adapted(model: nn.Module) -> nn.Module:
    """Return the one model inside that carries adapters; the model itself unless there is one."""
    carriers = list(adapted_inside(model).values())
    return carriers[0] if len(carriers) == 1 else model


def is_engine(model: nn.Module) -> bool:
    """Return whether `deepspeed.initialize` made this model.

    Told by name, since most environments are without DeepSpeed.
    """
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def is_wrapper(module: nn.Module) -> bool:
    """Return whether this is an adapter layer around a base layer, as PEFT builds them."""
    return _peft_key(module) == "base_layer"


def _peft_key(module: nn.Module) -> str | None:
    """Return the one of `_PEFT_KEYS` that PEFT keeps in this module; None for any other module."""
    if not hasattr(module, "_disable_adapters"):
        return None
    for key in _PEFT_KEYS:
        if isinstance(getattr(module, key, None), nn.Module):
            return key
    return None


def peft_name(name: str) -> str:
    """Return a module's name as PEFT's patterns and targets have it.

    Args:
        name: in a `PeftModel`, compiled as a whole or not.
    """
    while name.startswith(("_orig_mod.", PEFT_PREFIX)):
        name = name.removeprefix("_orig_mod.").removeprefix(PEFT_PREFIX)
    return name


def without_wrappers(path: str) -> str:
    """Return the path of a module, wrapped or in a wrapper, in the model without adapters."""
    return ".".join(part for part in path.split(".") if part not in _PEFT_KEYS)


def peft_names(model: nn.Module) -> set[str]:
    """Return the names of the base model's modules as PEFT's patterns have them."""
    names: set[str] = set()
    hidden: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(hidden):
            continue
        wrapped = _peft_key(module)
        if wrapped is not None:
            added = [child for child, _ in module.named_children() if child != wrapped]
            hidden += tuple(f"{path}.{child}" for child in added)
        names.add(peft_name(without_wrappers(path)))
    return names


def base_name(name: str) -> str:
    """Return a module's name in the base model, as records have it, without any wrapper."""
    path = without_wrappers(name)
    return peft_name(".".join(part for part in path.split(".") if part not in _WRAPPER_KEYS))


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a compiled, FSDP1-wrapped or checkpointed one; else None."""
    for key in _WRAPPER_KEYS:
        if key in module._modules:
            return module._modules[key]
    return None


def plain_layer(module: nn.Module) -> nn.Module:
    """Return the layer inside wrappers and adapters."""
    inside = wrapped_module(module)
    if inside is not None:
        return plain_layer(inside)
    key = _peft_key(module)
    return module if key is None else plain_layer(module.get_submodule(key))


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield (base name, module in the model, plain layer) of everything that can be targeted.

    Wrappers and adapters are looked through.
    """
    hidden: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(hidden):
            continue
        wrapped = _peft_key(module)
        if wrapped is not None:
            # A base layer may have layers of its own; a copy that is trained stands for all of it.
            below = [child for child, _ in module.named_children() if child != "base_layer"]
            hidden += tuple(f"{path}.{child}" for child in below)
        if path.endswith(".base_layer"):
            continue  # yielded already, with what is around it
        if wrapped is not None:
            yield base_name(path), module, plain_layer(module)
        elif path and wrapped_module(module) is None:
            yield base_name(path), module, module


def base_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the base model by its name in `model`, without what adapters add."""
    yield name, model
    inside = _peft_key(model)
    for key, child in model.named_children():
        if inside is None or key == inside:
            yield from base_modules(child, f"{name}.{key}" if name else key)


def adapted_parameters(module: nn.Module) -> list[str]:
    """Return the parameters that PEFT's wrappers around a module adapt, outermost first.

    They are its `target_parameters`.
    """
    names: list[str] = []
    while is_wrapper(module) and isinstance(getattr(module, "parameter_name", None), str):
        names.append(str(module.parameter_name))
        module = module.get_submodule("base_layer")
    return names


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the model's output embedding; None where it has none or does not say."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            head = getter()
            return head if isinstance(head, nn.Module) else None
    return None


def encoder_decoders(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are encoder-decoder models, as their configuration says."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False) is True:
            yield module


def base_model(model: nn.Module) -> nn.Module:
    """Return the model of the library or the user, inside compiled graphs, FSDP1 and PEFT."""
    inner = wrapped_module(model)
    if inner is None:
        inner = getattr(model, "get_base_model", lambda: model)()
    return model if inner is model else base_model(inner)


def describe(model: nn.Module) -> str:
    """Return a model's class and, where it is known, the name or path of its weights.

    They are those of the adapted model inside if there is one.
    """
    inner = base_model(adapted(model))
    source = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    # fully_shard puts a class of its own before the model's.
    names = (kind.__name__ for kind in type(inner).__mro__)
    class_name = next(name for name in names if not name.startswith("FSDP"))
    return f"{class_name} {source}".strip()
