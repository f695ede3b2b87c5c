"""Tiny Llamas with an adapter, shared by the tests of adapters."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

GONE = "model.layers.0.self_attn.q_proj"


SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | options)).eval()


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


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Every parameter that trains, moved at random."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}
