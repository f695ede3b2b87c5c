"""MiLoRA: the adapter starts as the part of W that matters least. arXiv 2406.09044."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from evatune.adapters.lora_layers import lora_layers
from evatune.finetune.methods.base import Batches
from evatune.finetune.methods.singular import minor_triplets
from evatune.finetune.methods.weight_init import WeightInit, subtract_from_base


@dataclass(frozen=True)
class Milora(WeightInit):
    """The smallest singular triplets of W."""

    @torch.no_grad()
    def apply(self, model: Any, batches: Batches) -> None:
        """Split W = UΣVᵀ: the r smallest singular triplets become the adapter, the rest stays.

        B = U√(Σ/s), A = √(Σ/s)Vᵀ (section 3 of the paper), s the adapter's scale, so that s·BA is
        the minor part itself. Signs are those that make the largest entry of each row of A
        positive. Costs one SVD per layer, in float32.
        """
        for layer in lora_layers(model).values():
            weight = layer.get_base_layer().weight
            rank = layer.r["default"]
            u, values, vt = minor_triplets(weight.T if layer.fan_in_fan_out else weight, rank)
            root = (values / layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight.copy_(root[:, None] * vt)
            layer.lora_B["default"].weight.copy_(u * root)
            subtract_from_base(layer)


METHODS = (
    Milora(
        "milora",
        least_width=1,
        about="B·A is the smallest singular triplets of W",
        source="Wang et al. 2024, arXiv 2406.09044",
    ),
)
