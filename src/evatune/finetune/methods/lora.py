"""LoRA, and its variants that are options of PEFT's `LoraConfig`."""

from __future__ import annotations

from evatune.finetune.methods.base import Lora

METHODS = (
    Lora("lora", source="Hu et al. 2021"),
    Lora("rslora", {"use_rslora": True}, source="Kalajdzievski 2023"),
    Lora("dora", {"use_dora": True}, source="Liu et al. 2024"),
    Lora("mica", {"init_lora_weights": "mica"}, source="arXiv 2604.01694"),
)
