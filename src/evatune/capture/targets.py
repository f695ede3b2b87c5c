"""Which modules are calibrated, under which name, and how wide their inputs and outputs are."""

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
    _plain,
    adapted_parameters,
    is_wrapper,
    named_layers,
    output_embedding,
)

Targets = str | Iterable[str] | None


def find_target_layers(model: nn.Module, targets: Targets = None) -> list[TargetLayer]:
    """The layers to calibrate, in model order.

    Args:
        model: any module, or a `PeftModel`.
        targets: as PEFT names them. "all-linear": every linear layer but the output embedding. Any
            other string: a regular expression that must match a module's whole name. A list: names
            or suffixes of names. None: the layers that carry an adapter if there are any, else
            "all-linear". A name may also be that of a parameter in which the weights of experts are
            stacked.

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

    target_layers: list[TargetLayer] = []
    unsupported = []
    # attention that is chosen, and has its output projection as a part already
    held: tuple[str, ...] = ()
    for name, found, plain in layers:
        if held and name.startswith(held):
            continue
        parts = target_layers_of(name, plain)
        if name in chosen and any(part.parameter for part in parts):
            held = (*held, f"{name}.")
        weights = [] if parts else [key for key in _stacked(plain) if matches(f"{name}.{key}")]
        if name in chosen:
            target_layers += parts
            weights += adapted_parameters(found)
            if strict and not parts and not weights:
                unsupported.append(f"{name} ({type(plain).__name__})")
        for key in weights:
            target_layers += parameter_target_layers(f"{name}.{key}", plain)
    if unsupported:
        more = f" and {len(unsupported) - 5} more" if len(unsupported) > 5 else ""
        raise TargetError(
            "these targets are of a kind that is not supported:"
            f" {', '.join(unsupported[:5])}{more};"
            f" supported are {', '.join(kind.name for kind in LAYER_TYPES)} and stacked weights of"
            " experts. Name the linear layers or others of these instead, or leave those out with"
            " exclude_modules in the LoraConfig"
        )
    if not target_layers:
        raise TargetError(_nothing_matches(targets, layers))
    return target_layers


def _stacked(module: nn.Module) -> list[str]:
    """Parameters of a shape in which the weights of experts are stacked."""
    return [
        key
        for key, parameter in module.named_parameters(recurse=False)
        if len(whole_shape(parameter)) == 3
    ]


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
            raise TargetError(
                f"targets {targets!r} is not a regular expression: {error}"
            ) from error
        return lambda name: pattern.fullmatch(name) is not None
    names = list(targets)
    return lambda name: any(name == target or name.endswith(f".{target}") for target in names)


def _nothing_matches(targets: Targets, layers: list[tuple[str, nn.Module, nn.Module]]) -> str:
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
