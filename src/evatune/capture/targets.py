"""Which modules are calibrated, under which name, and how wide their inputs and outputs are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from evatune.capture.kinds import KINDS, Part, expert_parts, is_linear, parts_of
from evatune.errors import AdapterError, TargetError

Targets = str | Iterable[str] | None

# The one child of modules that stand for another one: of torch.compile, FSDP1, and torch's activation checkpointing.
_STAND_INS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


# Where PEFT keeps what it wraps: below an adapter, or beside a copy that is trained.
_WRAPPED = ("base_layer", "original_module")


@dataclass(frozen=True)
class Site:
    """A module whose input is watched, or a parameter whose products are."""

    name: str  # in the base model, without any wrapper's prefix
    module: nn.Module  # the plain layer, inside its wrapper if it has one
    part: Part
    unit: str  # sites of one unit are one layer to PEFT, which gives them one rank

    @property
    def in_features(self) -> int:
        return self.part.in_features

    @property
    def out_features(self) -> int:
        return self.part.out_features


def sites_of(name: str, module: nn.Module, parts: list[Part]) -> list[Site]:
    """One site per part of a layer."""
    return [Site(name + part.suffix, module, part, name) for part in parts]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or DeepSpeed's engine, whose wrapping is for training."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or is_engine(model):
        return unwrapped(model.get_submodule("module"))
    inside = stood_for(model)  # the wrapper itself may be compiled
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
    """The one model inside that carries adapters; the model itself where there is none or are several."""
    found = adapted_inside(model)
    return next(iter(found.values())) if len(found) == 1 else model


def is_engine(model: nn.Module) -> bool:
    """Whether `deepspeed.initialize` returned this; told by name, since most environments are without DeepSpeed."""
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
    """A module's name as PEFT's patterns and targets have it, from its name in a `PeftModel`, compiled as a whole or not."""
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
    """A module's name in the base model, as records have it: stand-ins within the model are left out as well."""
    path = without_wrappers(name)
    return peft_name(".".join(part for part in path.split(".") if part not in _STAND_INS))


def stood_for(module: nn.Module) -> nn.Module | None:
    """The module that a compiled, FSDP1-wrapped or checkpointed one stands for; None for any other."""
    return next((module._modules[key] for key in _STAND_INS if key in module._modules), None)


def _plain(module: nn.Module) -> nn.Module:
    """The layer inside stand-ins and adapters."""
    inside = stood_for(module)
    if inside is None:
        part = _inside(module)
        inside = module.get_submodule(part) if part else None
    return module if inside is None else _plain(inside)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(base name, module as found, plain layer) of everything that can be targeted; adapters are looked through."""
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
        elif path and stood_for(module) is None:
            yield base_name(path), module, module


def base_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of the base model by its name in `model`; what adapters add is passed by."""
    yield name, model
    inside = _inside(model)
    for key, child in model.named_children():
        if inside is None or key == inside:
            yield from base_modules(child, f"{name}.{key}" if name else key)


def find_sites(model: nn.Module, targets: Targets = None) -> list[Site]:
    """The layers to calibrate, in model order.

    Args:
        model: any module, or a `PeftModel`.
        targets: as PEFT names them. "all-linear": every linear layer but the output embedding. Any other
            string: a regular expression that must match a module's whole name. A list: names or suffixes of
            names. None: the layers that carry an adapter if there are any, else "all-linear". A name may also be
            that of a parameter in which the weights of experts are stacked.

    Raises:
        TargetError: nothing matches, or a match is of a kind that is not supported.
    """
    layers = list(named_layers(model))
    matches, strict = _matcher([]), False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        chosen = _all_linear(model, layers)
    elif targets is not None:
        matches, strict = _matcher(targets), True
        chosen = {name for name, _, _ in layers if matches(name)}
    else:
        chosen = {name for name, found, _ in layers if is_wrapper(found)}
        chosen, strict = (chosen, True) if chosen else (_all_linear(model, layers), False)

    sites: list[Site] = []
    odd = []
    held: tuple[str, ...] = ()  # attention that is chosen, and has its output projection as a part already
    for name, found, plain in layers:
        if held and name.startswith(held):
            continue
        parts = parts_of(plain)
        if name in chosen and any(part.parameter for part in parts):
            held = (*held, f"{name}.")
        weights = [] if parts else [key for key in _stacked(plain) if matches(f"{name}.{key}")]
        if name in chosen:
            sites += sites_of(name, plain, parts)
            weights += adapted_parameters(found)
            if strict and not parts and not weights:
                odd.append(f"{name} ({type(plain).__name__})")
        for key in weights:
            sites += parameter_sites(f"{name}.{key}", plain)
    if odd:
        raise TargetError(
            f"these targets are of a kind that is not supported: {', '.join(odd[:5])}"
            f"{f' and {len(odd) - 5} more' if len(odd) > 5 else ''}; supported are "
            f"{', '.join(kind.name for kind in KINDS)} and stacked weights of experts. Name the linear layers "
            "or others of these instead, or leave those out with exclude_modules in the LoraConfig"
        )
    if not sites:
        raise TargetError(_nothing_matches(targets, layers))
    return sites


def parameter_sites(name: str, module: nn.Module) -> list[Site]:
    """The sites of a weight that a module holds and multiplies with itself, by the weight's whole name."""
    key = name.rpartition(".")[2]
    # As PEFT reads it: slices are (out, in), unless the module says that they are transposed.
    transposed = bool(getattr(module, "is_transposed", False))
    return sites_of(name, module, expert_parts(key, whole_shape(module.get_parameter(key)), transposed=transposed))


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of a parameter that may be in DeepSpeed's shards, which are flat."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def adapted_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that PEFT's wrappers around a module adapt (`target_parameters`), outermost first."""
    found = []
    while isinstance(key := getattr(module, "parameter_name", None), str) and is_wrapper(module):
        found.append(key)
        module = module.get_submodule("base_layer")
    return found


def _stacked(module: nn.Module) -> list[str]:
    """Parameters of a shape in which the weights of experts are stacked."""
    return [key for key, parameter in module.named_parameters(recurse=False) if len(whole_shape(parameter)) == 3]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model inside a `PeftModel`, then put every adapter's switch back as it was.

    PEFT's own `disable_adapter` also rewrites `requires_grad`; this touches the one flag that the forward
    pass reads. It lets adapters on the meta device (low_cpu_mem_usage) stand aside as well.
    """
    # Not hasattr(m, …): what a module does not have it looks for at length, and this runs for each batch.
    key = "_disable_adapters"
    switches = [m for m in model.modules() if key in m.__dict__ or hasattr(type(m), key)]
    if any(getattr(m, "merged_adapters", None) for m in switches):
        raise AdapterError("an adapter is merged into the base weights; call unmerge_adapter() first")
    before = [m._disable_adapters for m in switches]
    try:
        for module in switches:
            module._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module._disable_adapters = value


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The model's output embedding as it stands in the model; None where it has none or does not say."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            found = getter()
            return found if isinstance(found, nn.Module) else None
    return None


def _all_linear(model: nn.Module, layers: list[tuple[str, nn.Module, nn.Module]]) -> set[str]:
    """PEFT's "all-linear": the output embedding is left out."""
    head = output_embedding(model)
    output = None if head is None else _plain(head)
    return {name for name, _, plain in layers if is_linear(plain) and plain is not output}


def _matcher(targets: str | Iterable[str]) -> Callable[[str], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"targets {targets!r} is not a regular expression: {error}") from error
        return lambda name: pattern.fullmatch(name) is not None
    names = list(targets)
    return lambda name: any(name == target or name.endswith(f".{target}") for target in names)


def _nothing_matches(targets: Targets, layers: list[tuple[str, nn.Module, nn.Module]]) -> str:
    linear = [name for name, _, plain in layers if is_linear(plain)]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if not linear:
        return f"targets {targets!r} match nothing: the model has no linear layer at all"
    return (
        f"targets {targets!r} match no layer of this model. Linear layers end in: {', '.join(suffixes[:12])}"
        f"{' …' if len(suffixes) > 12 else ''}; try targets='all-linear', a list of such endings, or a regular "
        f"expression for whole names such as {linear[0]!r}"
    )
