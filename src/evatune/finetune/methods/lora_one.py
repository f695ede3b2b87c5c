"""LoRA-One: the adapter starts as one step of gradient descent. arXiv 2502.01235."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch

from evatune.adapters.lora_layers import lora_layers
from evatune.calibration import Calibration
from evatune.finetune.methods.base import Lora, Preparation
from evatune.finetune.methods.singular import leading_triplets
from evatune.modeling.state import evaluation_state

_BATCHES, _EXAMPLES = 8, 1
_GAMMA = 128
_WIDTH, _ITERATIONS = 512, 16  # of the randomized SVD


@dataclass(frozen=True)
class LoraOne(Lora):
    """The leading singular triplets of the loss's negative gradient by W, which stays as it is.

    With −G = UΣVᵀ, G the mean gradient, the scale s = α/√r of rsLoRA and γ = 128,

        A = √(Σᵣ/σ₁)/√γ · Vᵣᵀ,   B = Uᵣ · √(Σᵣ/σ₁)/√γ,

    so that the model differs from its base from the start: it has taken a step downhill, cut off at
    rank r. That is the authors' code (commit 01bba05), whose README has Σᵣ in place of √(Σᵣ/σ₁). γ,
    the width and the iterations of the SVD, and the mean over 8 batches of 1 training example are
    its defaults.
    """

    fits_quantized: ClassVar[bool] = False
    fits_shards: ClassVar[bool] = False
    linear_only: ClassVar[bool] = True

    @torch.no_grad()
    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        """Write A and B into every layer; a run that goes on then loads its own.

        Random numbers, modes and gradients are left as they were.

        Raises:
            ConfigError: a layer that the training data never reaches.
        """
        with evaluation_state(model):
            torch.manual_seed(preparation.seed)
            gradients = self.gradients(model, islice(preparation.batches(_EXAMPLES), _BATCHES))
            for name, layer in lora_layers(model).items():
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                descent = -gradients.pop(name).to(a.device)
                u, values, vt = leading_triplets(
                    descent, len(a), width=_WIDTH, iterations=_ITERATIONS
                )
                root = (values / values[0] / _GAMMA).sqrt()
                a.copy_(root[:, None] * vt)
                b.copy_(u * root)
        return None


METHODS = (
    LoraOne(
        "lora-one",
        {"use_rslora": True},
        least_width=1,
        about="B·A as one step of gradient descent",
        source="Zhang et al. 2025, arXiv 2502.01235",
    ),
)
