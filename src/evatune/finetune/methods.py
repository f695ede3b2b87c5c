"""Methods of fine-tuning under one name each: what is trained, and how it starts. All else is equal
between them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from evatune.adapters.lora_layers import find_lora_targets
from evatune.api import calibrate
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.result import Calibration
from evatune.capture.recorder import RowsFunction
from evatune.capture.targets import find_target_layers
from evatune.errors import ConfigError
from evatune.finetune import weight_inits as starts
from evatune.finetune.milora import milora
from evatune.finetune.weight_inits import Batches, WeightInit, lora_layers

Initialize = Callable[..., Calibration]


_MINOR_BATCHES, _MINOR_EXAMPLES = 16, 16  # of the pass of eva-minor


@dataclass(frozen=True)
class Method:
    """How a method differs from LoRA as PEFT builds it, and which layers it is right for."""

    options: dict[str, Any] = field(default_factory=dict)  # of LoraConfig
    eva: dict[str, Any] | None = None  # options of evatune.initialize, if that starts it
    start: WeightInit | None = None  # what moves a part of the base weights into the adapter
    adapter: bool = True
    random_a: bool = False  # EVA's ranks, PEFT's A
    minor: bool = False  # the smallest directions instead of the largest
    conv1d: bool = True  # runs on GPT-2's Conv1D, whose weight is (in, out)
    width: int = 0  # each layer must be at least this many times the rank wide, both in and out
    source: str = ""


METHODS: dict[str, Method] = {
    "lora": Method(source="Hu et al. 2021"),
    "lora-orthogonal": Method({"init_lora_weights": "orthogonal"}),
    "rslora": Method({"use_rslora": True}, source="Kalajdzievski 2023"),
    "pissa": Method(start=starts.pissa, width=1, source="Meng et al. 2024"),
    "olora": Method(start=starts.olora, width=1, conv1d=False, source="Büyükakyüz 2024"),
    "milora": Method(start=milora, width=1, source="Wang et al. 2024, arXiv 2406.09044"),
    "corda": Method(start=starts.corda, width=1, source="Yang et al. 2024"),
    # On Conv1D PEFT takes the width of the input for that of the output in the length of B.
    "lora-ga": Method(
        start=starts.lora_ga, width=2, conv1d=False, source="Wang et al. 2024, arXiv 2407.05000"
    ),
    "mica": Method({"init_lora_weights": "mica"}, source="arXiv 2604.01694"),
    "dora": Method({"use_dora": True}, source="Liu et al. 2024"),
    "adalora": Method(source="Zhang et al. 2023"),
    "loraplus": Method(source="Hayou et al. 2024"),
    "eva": Method(eva={}, source="Paischer et al. 2024"),
    "eva-rho1": Method(eva={"rho": 1}),  # the directions alone: every layer keeps its rank
    "eva-dora": Method({"use_dora": True}, eva={}),
    "eva-whiten": Method(eva={"scale": "whiten"}),
    "eva-matched": Method(eva={"scale": "matched"}),
    "lora-redist": Method(eva={}, random_a=True),
    "eva-minor": Method(minor=True, width=1),
    "full": Method(adapter=False),
    "head": Method(adapter=False),
    "untouched": Method(adapter=False),  # nothing is trained: what the checkpoint can do
}


# Known by name, and why no run has them.
_REFUSED = {
    "loftq": (
        "starts an adapter from the error of quantising the base to 4 bits, for which PEFT needs a"
        " GPU and bitsandbytes, and every base here is loaded unquantised; pissa, olora and milora"
        " start from the weights too"
    )
}


_INSTEAD = "lower adapter.rank, name other adapter.targets, or choose lora or eva"


def require_method(name: str) -> None:
    """Raise a ConfigError for a method that does not exist, or that nothing here can run."""
    if name in _REFUSED:
        raise ConfigError(f"method {name!r} {_REFUSED[name]}")
    if name not in METHODS:
        raise ConfigError(f"method is {name!r}; choose one of {', '.join(METHODS)}")


def adapt(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: str | list[str],
    task_type: str | None,
    head: list[str],
    new_head: bool,
    steps: int,
) -> Any:
    """The model with what the method trains set up, before any data is seen.

    Args:
        task_type: PEFT's, None for a model that it has no name for.
        head: endings of the names of the modules that "head" trains. new_head: every method trains
            them in full.
        steps: optimiser steps to come, which AdaLoRA plans by.

    Raises:
        ConfigError: the method cannot run on these layers or at this rank. TargetError: no layer
            matches.
    """
    method = METHODS[name]
    if not method.adapter:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(
                name == "full"
                or (name == "head" and any(sublayer in path.split(".") for sublayer in head))
            )
        if name == "head" and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"method 'head' finds no weights of its own in {', '.join(head)}, which may share"
                " those of the embeddings; choose lora or full"
            )
        return model
    target_layers = find_target_layers(model, targets)  # whose error says what would match
    common: dict[str, Any] = {
        "target_modules": targets,
        "lora_alpha": alpha,
        "modules_to_save": head if new_head else None,
        "task_type": TaskType(task_type) if task_type else None,
    }
    config: Any = LoraConfig(r=rank, **common, **method.options)
    if name == "adalora":
        # Starts at 1.5 times the rank and prunes to it over the middle part of the run, in the
        # paper's proportions.
        config = AdaLoraConfig(
            **common,
            init_r=math.ceil(1.5 * rank),
            target_r=rank,
            total_step=steps,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=max(1, steps // 100),
        )
    with warnings.catch_warnings():
        # PEFT then sets it
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            # The weights that PEFT adapts without a layer to call, which cannot have every variant
            # of LoRA.
            held = dict.fromkeys(
                target_layer.rank_group
                for target_layer in target_layers
                if target_layer.sublayer.parameter
            )
            where = f" at {', '.join(list(held)[:3])}" if held else ""
            raise ConfigError(
                f"method {name!r} cannot run on this model ({error}){where}; {_INSTEAD}"
            ) from error
    _require_fit(adapted, name)
    if name == "adalora":
        _keep_penalty_out_of_evaluation(adapted.base_model)
    return adapted


def prepare(
    model: nn.Module,
    name: str,
    initialize: Initialize,
    batches: Batches,
    *,
    rho: float,
    seed: int,
    start: Path,
    rows: RowsFunction | None = None,
    budget: str = "ranks",
) -> Calibration | None:
    """What the method does before training, with data or with the weights.

    Args:
        initialize: `evatune.initialize`, bound to the model or trainer.
        batches: examples per batch → training batches, for passes of other kinds.
        rows: the task's choice of rows, for the same. rho, budget: of EVA's redistribution.
        start: where a method that changes the base weights keeps its adapter as it was before
            training.
    """
    method = METHODS[name]
    if method.start is not None:
        starts.begin(model, method.start, batches, seed, start)
    if method.eva is not None:
        calibration = initialize(**({"rho": rho, "budget": budget} | method.eva))
        if method.random_a:
            _redraw(model, seed)
        return calibration
    if method.minor:
        return _write_minor(model, batches(_MINOR_EXAMPLES), rows)
    return None


def optimizer_for(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, ratio: float
) -> Any:
    """The optimiser where a method brings its own, else None."""
    if name != "loraplus":
        return None
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=learning_rate,
        loraplus_lr_ratio=ratio,
        weight_decay=weight_decay,
    )


def after_step(model: nn.Module, name: str, step: int) -> None:
    """What a method does between an optimiser step and the clearing of gradients."""
    if name == "adalora":
        model.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the gradient of all A and of all B; empty where there are none."""
    found: dict[str, list[Tensor]] = {"A": [], "B": []}
    for path, parameter in model.named_parameters():
        for sublayer, tensors in found.items():
            if f"lora_{sublayer}" in path and parameter.grad is not None:
                tensors.append(parameter.grad.float().norm())
    return {
        f"grad_norm_{sublayer}": float(torch.stack(tensors).norm())
        for sublayer, tensors in found.items()
        if tensors
    }


def save(model: Any, name: str, folder: Path, start: Path) -> None:
    """Write the adapter (or the whole model), such that it fits the original base weights.

    Args:
        start: as for `prepare`.
    """
    if METHODS[name].start is not None:
        starts.save_for_base(model, folder, start)
    else:
        model.save_pretrained(folder)


def _require_fit(model: nn.Module, name: str) -> None:
    """Raise a ConfigError where the method would fail on a layer, or be another method than its
    name says."""
    method = METHODS[name]
    layers = lora_layers(model)
    linear = {
        lora_target.name
        for lora_target in find_lora_targets(model, "default")[0]
        if lora_target.is_linear
    }
    other = [
        f"{path} ({type(layer.get_base_layer()).__name__})"
        for path, layer in layers.items()
        if path not in linear
    ]
    if other and (method.start is not None or method.minor or method.random_a):
        raise ConfigError(
            f"method {name!r} is defined for linear layers, and {other[0]} is none; name other"
            " adapter.targets, or choose lora or eva"
        )
    conv1d = [path for path, layer in layers.items() if getattr(layer, "fan_in_fan_out", False)]
    if conv1d and not method.conv1d:
        raise ConfigError(
            f"method {name!r} is not right on GPT-2's Conv1D layers, whose weights lie transposed"
            f" (here {conv1d[0]} and others); choose pissa, milora, corda or eva, or name linear"
            " layers as adapter.targets"
        )
    for path, layer in layers.items():
        sizes, least = (layer.in_features, layer.out_features), method.width * layer.r["default"]
        if min(sizes) < least:
            raise ConfigError(
                f"method {name!r} at adapter.rank {layer.r['default']} needs layers at least"
                f" {least} wide, and {path} maps {sizes[0]} to {sizes[1]} values; {_INSTEAD}"
            )


def _keep_penalty_out_of_evaluation(model: Any) -> None:
    """PEFT adds AdaLoRA's penalty on P and Q to every loss; an evaluation's is compared with those
    of other methods."""
    config = model.peft_config["default"]
    weight = config.orth_reg_weight

    def before(module: nn.Module, *_: Any) -> None:
        config.orth_reg_weight = weight if module.training else 0.0

    def after(*_: Any) -> None:
        config.orth_reg_weight = weight  # as it is to be saved

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


@torch.no_grad()
def _redraw(model: nn.Module, seed: int) -> None:
    """PEFT's default A in every layer, at the ranks that are there."""
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(seed)
    for layer in lora_layers(model).values():
        a = layer.lora_A["default"].weight
        drawn = torch.rand(a.shape, generator=generator, dtype=torch.float32, device=cpu)
        a.copy_((2 * drawn - 1) / a.shape[1] ** 0.5)


@torch.no_grad()
def _write_minor(
    model: nn.Module, batches: Iterable[Any], rows: RowsFunction | None
) -> Calibration:
    """A from the directions with least energy, uniform ranks: the control of EVA's claim."""
    layers = lora_layers(model)
    width = max(layer.in_features for layer in layers.values())
    config = CalibrationConfig(
        rank=next(iter(layers.values())).r["default"],
        rho=1,
        sketch="exact",
        max_batches=_MINOR_BATCHES,
    )
    calibration = calibrate(
        model, batches, replace(config, components=width, tolerance=0), rows=rows
    )
    for path, layer in layers.items():
        a = layer.lora_A["default"].weight
        a.copy_(calibration.spectra[path].directions[-len(a) :])
    return calibration
