"""MiLoRA: the adapter starts as the part of the weights that matters least. Wang et al. 2024, arXiv
2406.09044."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evatune.finetune.weight_inits import Batches, lora_layers, subtract_from_base
from evatune.sketch.spectrum import fix_signs


@torch.no_grad()
def milora(model: Any, batches: Batches) -> None:
    """Split W = UΣVᵀ in two: the r smallest singular triplets become the adapter, the rest stays in
    the base.

    B = U√(Σ/s), A = √(Σ/s)Vᵀ (section 3 of the paper), s the adapter's scale, so that s·BA is the
    minor part itself. Signs are those that make the largest entry of each row of A positive. Costs
    one SVD per layer, in float32.
    """
    for layer in lora_layers(model).values():
        weight = layer.get_base_layer().weight
        minor = _minor_triplets(weight.T if layer.fan_in_fan_out else weight, layer.r["default"])
        root = (minor[1] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.copy_(root[:, None] * minor[2])
        layer.lora_B["default"].weight.copy_(minor[0] * root)
        subtract_from_base(layer)


# weight: (out, in)
def _minor_triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), Σ (r,) and Vᵀ (r, in) of the smallest singular values, falling."""
    u, values, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    rows = vt[-rank:]
    fixed = fix_signs(rows)
    signs = (fixed * rows).sum(1).sign()  # U must turn with V
    return u[:, -rank:] * signs, values[-rank:], fixed
