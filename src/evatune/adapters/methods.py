"""Methods of fine-tuning under one name each: what is trained, and how it starts. All else is equal between them."""

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
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evatune.calibrate import calibrate
from evatune.calibration import Calibration
from evatune.capture.targets import base_name, find_sites
from evatune.config import CalibrationConfig
from evatune.errors import ConfigError

Initialize = Callable[..., Calibration]


@dataclass(frozen=True)
class Method:
    """How a method differs from LoRA as PEFT builds it."""

    options: dict[str, Any] = field(default_factory=dict)  # of LoraConfig
    eva: dict[str, Any] | None = None  # options of evatune.initialize, if that starts it
    adapter: bool = True
    changes_base: bool = False  # the base weights are not what they were, so that saving must convert
    random_a: bool = False  # EVA's ranks, PEFT's A
    minor: bool = False  # the smallest directions instead of the largest
    source: str = ""


METHODS: dict[str, Method] = {
    "lora": Method(source="Hu et al. 2021"),
    "lora-orthogonal": Method({"init_lora_weights": "orthogonal"}),
    "rslora": Method({"use_rslora": True}, source="Kalajdzievski 2023"),
    "pissa": Method({"init_lora_weights": "pissa"}, changes_base=True, source="Meng et al. 2024"),
    "olora": Method({"init_lora_weights": "olora"}, changes_base=True, source="Büyükakyüz 2024"),
    "mica": Method({"init_lora_weights": "mica"}, source="arXiv 2604.01694"),
    "dora": Method({"use_dora": True}, source="Liu et al. 2024"),
    "adalora": Method(source="Zhang et al. 2023"),
    "loraplus": Method(source="Hayou et al. 2024"),
    "eva": Method(eva={}, source="Paischer et al. 2024"),
    "eva-dora": Method({"use_dora": True}, eva={}),
    "eva-whiten": Method(eva={"scale": "whiten"}),
    "eva-matched": Method(eva={"scale": "matched"}),
    "lora-redist": Method(eva={}, random_a=True),
    "eva-minor": Method(minor=True),
    "full": Method(adapter=False),
    "head": Method(adapter=False),
    "untouched": Method(adapter=False),  # nothing is trained: what the checkpoint can do
}


def require_method(name: str) -> None:
    """Raise a ConfigError for a method that does not exist."""
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
        head: endings of the names of the modules that "head" trains. new_head: every method trains them in full.
        steps: optimiser steps to come, which AdaLoRA plans by.
    """
    method = METHODS[name]
    if not method.adapter:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(name == "full" or (name == "head" and any(part in path.split(".") for part in head)))
        return model
    sites = find_sites(model, targets)  # whose error says what would match
    transposed = [site.name for site in sites if type(site.module).__name__ == "Conv1D"]
    if name == "olora" and transposed:
        raise ConfigError(
            f"method olora cannot start layers of the kind Conv1D, such as {transposed[0]!r}: PEFT's OLoRA reads their "
            "weights the wrong way round; choose another method, or other adapter.targets"
        )
    common: dict[str, Any] = {
        "target_modules": targets, "lora_alpha": alpha, "modules_to_save": head if new_head else None,
        "task_type": TaskType(task_type) if task_type else None,
        # PEFT corrects this by itself, but with a warning per layer.
        "fan_in_fan_out": len(transposed) == len(sites),
    }  # fmt: skip
    if name == "adalora":
        # Starts at 1.5 times the rank and prunes to it over the middle part of the run, in the paper's proportions.
        return get_peft_model(
            model,
            AdaLoraConfig(
                **common, init_r=math.ceil(1.5 * rank), target_r=rank, total_step=steps, tinit=steps // 10,
                tfinal=steps // 3, deltaT=max(1, steps // 100),
            ),
        )  # fmt: skip
    return get_peft_model(model, LoraConfig(r=rank, **common, **method.options))


def prepare(
    model: nn.Module, name: str, initialize: Initialize, batches: Callable[[], Iterable[Any]], *, rho: float, seed: int
) -> Calibration | None:
    """What the method does with data before training.

    Args:
        initialize: `evatune.initialize`, bound to the model or trainer.
        batches: fresh training batches, for passes of other kinds.
    """
    method = METHODS[name]
    if method.eva is not None:
        calibration = initialize(rho=rho, **method.eva)
        if method.random_a:
            _redraw(model, seed)
        return calibration
    if method.minor:
        return _write_minor(model, batches())
    return None


def optimizer_for(model: nn.Module, name: str, learning_rate: float, weight_decay: float, ratio: float) -> Any:
    """The optimiser where a method brings its own, else None."""
    if name != "loraplus":
        return None
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=ratio, weight_decay=weight_decay
    )


def after_step(model: nn.Module, name: str, step: int) -> None:
    """What a method does between an optimiser step and the clearing of gradients."""
    if name == "adalora":
        model.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the gradient of all A and of all B; empty where there are none."""
    found: dict[str, list[Tensor]] = {"A": [], "B": []}
    for path, parameter in model.named_parameters():
        for part, tensors in found.items():
            if f"lora_{part}" in path and parameter.grad is not None:
                tensors.append(parameter.grad.float().norm())
    return {f"grad_norm_{part}": float(torch.stack(tensors).norm()) for part, tensors in found.items() if tensors}


def save(model: Any, name: str, folder: Any, start: Any) -> None:
    """Write the adapter (or the whole model), such that it fits the original base weights.

    Args:
        start: folder of the adapter as it was before training; needed where the method changes the base weights.
    """
    if METHODS[name].changes_base:
        with warnings.catch_warnings():
            # PEFT loads the start beside the trained adapter for this, and warns against doing so.
            warnings.filterwarnings("ignore", message=".*changes the base weights", category=UserWarning)
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))
        # PEFT's conversion writes the LoRA matrices alone; the head that was trained beside them belongs there too.
        path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
        whole = {key: value.contiguous() for key, value in get_peft_model_state_dict(model).items()} | load_file(path)
        save_file(whole, path, metadata={"format": "pt"})
    else:
        model.save_pretrained(folder)


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {base_name(path): module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _redraw(model: nn.Module, seed: int) -> None:
    """PEFT's default A in every layer, at the ranks that are there."""
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(model).values():
        a = layer.lora_A["default"].weight
        a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) / a.shape[1] ** 0.5)


@torch.no_grad()
def _write_minor(model: nn.Module, batches: Iterable[Any]) -> Calibration:
    """A from the directions with least energy, uniform ranks: the control of EVA's claim."""
    layers = _layers(model)
    width = max(layer.in_features for layer in layers.values())
    config = CalibrationConfig(rank=next(iter(layers.values())).r["default"], rho=1, sketch="exact", max_batches=16)
    calibration = calibrate(model, batches, replace(config, components=width, tolerance=0))
    for path, layer in layers.items():
        a = layer.lora_A["default"].weight
        a.copy_(calibration.spectra[path].directions[-len(a) :])
    return calibration
