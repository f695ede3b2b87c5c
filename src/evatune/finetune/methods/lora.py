"""LoRA, and its variants that are options of PEFT's `LoraConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evatune.finetune.methods.base import Lora


@dataclass(frozen=True)
class Mica(Lora):
    """MiCA: B starts on minor singular vectors of W and stays there."""

    fits_quantized: ClassVar[bool] = False


METHODS = (
    Lora("lora", about="random A, B = 0", source="Hu et al. 2021", role="reference"),
    Lora(
        "rslora",
        {"use_rslora": True},
        about="LoRA with α/√r in place of α/r",
        source="Kalajdzievski 2023",
    ),
    Lora(
        "dora",
        {"use_dora": True},
        about="LoRA of directions, magnitudes apart",
        source="Liu et al. 2024",
    ),
    Mica(
        "mica",
        {"init_lora_weights": "mica"},
        about="B kept on minor singular vectors of W, A from 0",
        frozen="B",
        source="arXiv 2604.01694",
    ),
)
