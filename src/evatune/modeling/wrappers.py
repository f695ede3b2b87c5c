"""Looking through what stands around a model or layer: DDP, FSDP, torch.compile, DeepSpeed,
PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# The one child of modules that stand for another one: of torch.compile, FSDP1, and torch's
# activation checkpointing.
_STAND_INS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


# Where PEFT keeps what it wraps: below an adapter, or beside a copy that is trained.
_WRAPPED = ("base_layer", "original_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or DeepSpeed's engine, whose wrapping
    is for training."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or is_engine(
        model
    ):
        return unwrapped(model.get_submodule("module"))
    inside = wrapped_module(model)  # the wrapper itself may be compiled
    return model if inside is None or unwrapped(inside) is inside else unwrapped(inside)


def adapted_inside(model: nn.Module) -> dict[str, nn.Module]:
    """Path → model that carries adapters, "" for the model itself; none inside another."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(getattr(module, "peft_config", None), dict):
            found[path] = module
    return found


def adapted(model: nn.Module) -> nn.Module:
    """The one model inside that carries adapters; the model itself where there is none or are
    several."""
    found = adapted_inside(model)
    return next(iter(found.values())) if len(found) == 1 else model


def is_engine(model: nn.Module) -> bool:
    """Whether `deepspeed.initialize` returned this; told by name, since most environments are
    without DeepSpeed."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def is_wrapper(module: nn.Module) -> bool:
    """Whether this is an adapter layer around a base layer, as PEFT builds them."""
    return _inside(module) == "base_layer"


def _inside(module: nn.Module) -> str | None:
    """The one of `_WRAPPED` that the module is a wrapper around; None for any other module."""
    if not hasattr(module, "_disable_adapters"):
        return None
    parts = {part: getattr(module, part, None) for part in _WRAPPED}
    return next((part for part, inside in parts.items() if isinstance(inside, nn.Module)), None)


def peft_name(name: str) -> str:
    """A module's name as PEFT's patterns and targets have it, from its name in a `PeftModel`,
    compiled as a whole or not."""
    while name.startswith(("_orig_mod.", "base_model.model.")):
        name = name.removeprefix("_orig_mod.").removeprefix("base_model.model.")
    return name


def without_wrappers(path: str) -> str:
    """The path of a module that is wrapped or in a wrapper, in the model without adapters."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def peft_names(model: nn.Module) -> set[str]:
    """Names of the base model's modules as PEFT's patterns have them, without what adapters add."""
    names: set[str] = set()
    hidden: tuple[str, ...] = ("\n",)
    for path, module in model.named_modules():
        if path.startswith(hidden):
            continue
        kept = _inside(module)
        if kept is not None:
            added = [child for child, _ in module.named_children() if child != kept]
            hidden += tuple(f"{path}.{child}" for child in added)
        names.add(peft_name(without_wrappers(path)))
    return names


def base_name(name: str) -> str:
    """A module's name in the base model, as records have it: stand-ins within the model are left
    out as well."""
    path = without_wrappers(name)
    return peft_name(".".join(part for part in path.split(".") if part not in _STAND_INS))


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that a compiled, FSDP1-wrapped or checkpointed one stands for; None for any
    other."""
    return next((module._modules[key] for key in _STAND_INS if key in module._modules), None)


def _plain(module: nn.Module) -> nn.Module:
    """The layer inside stand-ins and adapters."""
    inside = wrapped_module(module)
    if inside is None:
        part = _inside(module)
        inside = module.get_submodule(part) if part else None
    return module if inside is None else _plain(inside)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(base name, module as found, plain layer) of everything that can be targeted; adapters are
    looked through."""
    hidden: tuple[str, ...] = ("\n",)
    for path, module in model.named_modules():
        if path.startswith(hidden):
            continue
        kept = _inside(module)
        if kept:
            # A base layer may have layers of its own; a copy that is trained stands for all of it.
            below = [child for child, _ in module.named_children() if child != "base_layer"]
            hidden += tuple(f"{path}.{child}" for child in below)
        if path.endswith(".base_layer"):
            continue  # yielded already, with what is around it
        if kept:
            yield base_name(path), module, _plain(module)
        elif path and wrapped_module(module) is None:
            yield base_name(path), module, module


def base_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the base model by its name in `model`; what adapters add is passed
    by."""
    yield name, model
    inside = _inside(model)
    for key, child in model.named_children():
        if inside is None or key == inside:
            yield from base_modules(child, f"{name}.{key}" if name else key)


def adapted_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that PEFT's wrappers around a module adapt (`target_parameters`),
    outermost first."""
    found = []
    while isinstance(key := getattr(module, "parameter_name", None), str) and is_wrapper(module):
        found.append(key)
        module = module.get_submodule("base_layer")
    return found


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The model's output embedding as it stands in the model; None where it has none or does not
    say."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            found = getter()
            return found if isinstance(found, nn.Module) else None
    return None


def _base(model: nn.Module) -> nn.Module:
    """The model of the library or the user, inside compiled graphs, FSDP1 and PEFT."""
    inner = wrapped_module(model)
    if inner is None:
        inner = getattr(model, "get_base_model", lambda: model)()
    return model if inner is model else _base(inner)


def describe(model: nn.Module) -> str:
    """Class and, where it is known, name or path of the weights; of the adapted model inside if
    there is one."""
    inner = _base(adapted(model))
    source = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    # fully_shard puts a class of its own before the model's.
    kind = next(
        kind.__name__ for kind in type(inner).__mro__ if not kind.__name__.startswith("FSDP")
    )
    return f"{kind} {source}".strip()
