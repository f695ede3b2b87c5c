"""OLoRA: the adapter starts from W's QR decomposition. arXiv 2406.01775."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evatune.finetune.methods.base import Batches
from evatune.finetune.methods.weight_init import WeightInit, initialize_by_peft, peft_config


@dataclass(frozen=True)
class Olora(WeightInit):
    """The first columns of Q and rows of R."""

    def apply(self, model: Any, batches: Batches) -> None:
        initialize_by_peft(model, peft_config(model, init_lora_weights="olora"))


METHODS = (
    Olora(
        "olora",
        least_width=1,
        conv1d=False,
        about="A·B is a part of W by its QR",
        source="Büyükakyüz 2024",
    ),
)
