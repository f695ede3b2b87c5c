"""PiSSA: the adapter starts as the largest singular triplets of W. arXiv 2404.02948."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evatune.finetune.methods.base import Batches
from evatune.finetune.methods.weight_init import WeightInit, initialize_by_peft, peft_config


@dataclass(frozen=True)
class Pissa(WeightInit):
    """The largest singular triplets of W."""

    def apply(self, model: Any, batches: Batches) -> None:
        initialize_by_peft(model, peft_config(model, init_lora_weights="pissa"))


METHODS = (
    Pissa(
        "pissa",
        least_width=1,
        about="A·B is the largest singular triplets of W",
        source="Meng et al. 2024",
    ),
)
