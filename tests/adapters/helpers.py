"""Tiny Llamas with an adapter, shared by the tests of adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune.adapters.export.merged import load_adapter, merge
from tests.helpers import tokens

GONE = "model.layers.0.self_attn.q_proj"


def adapted(model: Any, **options: Any) -> PeftModel:
    usual = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**usual | options))


PREFIX = "base_model.model."
QUIET = {"show_progress_bar": False}


def eva_config(**options: Any) -> LoraConfig:
    eva = {key: options.pop(key) for key in list(options) if key in EvaConfig.__dataclass_fields__}
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "init_lora_weights": "eva",
    } | options
    return LoraConfig(**settings, eva_config=EvaConfig(**eva))


def with_eva(model: nn.Module, meta: bool = False, **options: Any) -> PeftModel:
    return get_peft_model(model, eva_config(**options), low_cpu_mem_usage=meta)


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Every parameter that trains, moved at random."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def redistributed(model: Any, *gone: str) -> evatune.Calibration:
    """Initialize from a calibration by which layers `gone` are worth nothing, others more or
    less."""
    found = evatune.calibrate(model, tokens(4), evatune.CalibrationConfig(components=8))
    spectra = {}
    for place, (name, spectrum) in enumerate(found.spectra.items()):
        factor = 1e6 if name.startswith(gone) else 1 + place % 3
        spectra[name] = replace(spectrum, total_energy=spectrum.total_energy * factor)
    return evatune.initialize(model, replace(found, spectra=spectra))


def logits(model: nn.Module) -> Tensor:
    ids = torch.cat([tokens()[0]["input_ids"], torch.arange(48, 60)[None]])
    return model.eval()(input_ids=ids).logits.detach()


def merge_adapter(base: nn.Module, adapter: Path) -> nn.Module:
    """The base model with a saved adapter added into its weights, in place."""
    return merge(load_adapter(base, adapter), adapter)
