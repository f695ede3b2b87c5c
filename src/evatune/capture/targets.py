"""Finds the layers to calibrate, by the targets that PEFT's configuration names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from evatune.capture.layer_types import (
    LAYER_TYPES,
    TargetLayer,
    is_linear,
    parameter_target_layers,
    target_layers_of,
)
from evatune.errors import TargetError
from evatune.modeling.sharding import whole_shape
from evatune.modeling.wrappers import (
    adapted_parameters,
    is_wrapper,
    named_layers,
    output_embedding,
    plain_layer,
)
from evatune.utils.text import shortened

Targets = str | Iterable[str] | None
Layers = list[tuple[str, nn.Module, nn.Module]]  # what `named_layers` yields


def find_target_layers(model: nn.Module, targets: Targets = None) -> list[TargetLayer]:
    """Return the layers to calibrate, in model order.

    Args:
        model: any module, or a `PeftModel`.
        targets: as PEFT names them. "all-linear": every linear layer but the output embedding. Any
            other string: a regular expression that must match a module's whole name. A list: names
            or suffixes of names. None: the layers that carry an adapter if there are any, else
            "all-linear". A name may also be that of a parameter in which the weights of experts are
            stacked.

    Raises:
        TargetError: nothing matches, or a match is of a type that is not supported.
    """
    layers = list(named_layers(model))
    chosen, matches, strict = _choose(model, layers, targets)
    target_layers: list[TargetLayer] = []
    unsupported = []
    # attention that is chosen, and has its output projection as a part already
    covered: tuple[str, ...] = ()
    for name, module, plain in layers:
        if name.startswith(covered):
            continue
        parts = target_layers_of(name, plain)
        weights = []
        if not parts:
            weights = [key for key in _stacked(plain) if matches(f"{name}.{key}")]
        if name in chosen:
            target_layers += parts
            weights += adapted_parameters(module)
            if any(part.parameter for part in parts):
                covered = (*covered, f"{name}.")
            if strict and not parts and not weights:
                unsupported.append(f"{name} ({type(plain).__name__})")
        for key in weights:
            target_layers += parameter_target_layers(f"{name}.{key}", plain)
    if unsupported:
        supported = ", ".join(layer_type.name for layer_type in LAYER_TYPES)
        raise TargetError(
            "these targets are of a type that is not supported:"
            f" {shortened(unsupported)};"
            f" supported are {supported} and stacked weights of experts. Name the linear layers or"
            " others of these instead, or leave those out with exclude_modules in the LoraConfig"
        )
    if not target_layers:
        raise TargetError(_nothing_matches(targets, layers))
    return target_layers


def _stacked(module: nn.Module) -> list[str]:
    """Return the parameters of a shape in which the weights of experts are stacked."""
    return [
        key
        for key, parameter in module.named_parameters(recurse=False)
        if len(whole_shape(parameter)) == 3
    ]


def _choose(
    model: nn.Module, layers: Layers, targets: Targets
) -> tuple[set[str], Callable[[str], bool], bool]:
    """Return the names that targets stand for, and how parameters are matched.

    Also whether each of those must be a layer that is supported, since it was asked for by name.
    """
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return _all_linear(model, layers), _matcher([]), False
    if targets is not None:
        matches = _matcher(targets)
        return {name for name, _, _ in layers if matches(name)}, matches, True
    adapted = {name for name, module, _ in layers if is_wrapper(module)}
    if adapted:
        return adapted, _matcher([]), True
    return _all_linear(model, layers), _matcher([]), False


def _all_linear(model: nn.Module, layers: Layers) -> set[str]:
    """Return what PEFT means by "all-linear", without the output embedding."""
    head = output_embedding(model)
    output = None if head is None else plain_layer(head)
    linear = [(name, plain) for name, _, plain in layers if is_linear(plain)]
    return {name for name, plain in linear if plain is not output}


def _matcher(targets: str | Iterable[str]) -> Callable[[str], bool]:
    """Return the function that tells the names that targets stand for."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(
                f"targets {targets!r} is not a regular expression: {error}"
            ) from error
        return lambda name: pattern.fullmatch(name) is not None
    names = list(targets) if isinstance(targets, Iterable) else [targets]
    if not all(isinstance(name, str) for name in names):
        raise TargetError(
            f"targets is {targets!r}; give 'all-linear', a list of names or their endings, or a"
            " regular expression"
        )
    return lambda name: any(name == target or name.endswith(f".{target}") for target in names)


def _nothing_matches(targets: Targets, layers: Layers) -> str:
    """Return the message that says what would match."""
    linear = [name for name, _, plain in layers if is_linear(plain)]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if not linear:
        return f"targets {targets!r} match nothing: the model has no linear layer at all"
    return (
        f"targets {targets!r} match no layer of this model. Linear layers end in:"
        f" {', '.join(suffixes[:12])}{' …' if len(suffixes) > 12 else ''}; try"
        " targets='all-linear', a list of such endings, or a regular expression for whole names"
        f" such as {linear[0]!r}"
    )
