"""LoRA-GA: the adapter starts from the gradient of the loss by W. arXiv 2407.05000."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraGAConfig

from evatune.adapters.lora_layers import lora_layers
from evatune.calibration import Calibration
from evatune.finetune.methods.base import Batches, Lora, Preparation, rows_of_a
from evatune.finetune.methods.singular import leading_triplets
from evatune.finetune.methods.weight_init import (
    WeightInit,
    initialize_by_peft,
    peft_config,
    subtract_from_base,
)
from evatune.modeling.state import evaluation_state

_BATCHES, _EXAMPLES = 64, 2
_GAMMA = 16
_ITERATIONS = 4  # of the randomized SVD, which is 4r columns wide


def _first_batches(batches: Batches) -> Iterable[Any]:
    """Return the batches that the gradient is a mean over."""
    return islice(batches(_EXAMPLES), _BATCHES)


@dataclass(frozen=True)
class LoraGA(WeightInit):
    """The leading singular vectors of the loss's gradient by W: the first r to A, the next r to B.

    With the mean gradient UΣVᵀ, the scale s = α/√r of rsLoRA and γ = 16,

        A = out^¼/√γ · V₁…ᵣᵀ,   B = out^¼/√γ · Uᵣ₊₁…₂ᵣ,   W ← W − s·BA.

    No singular value enters. That is the authors' code (commit 89af7de, direction "ArB2r", scale
    "stable"). γ, the width and the iterations of the SVD, and the mean over 64 batches of 2
    training examples, or over one pass if that is less, are its defaults.
    """

    def apply(self, model: Any, batches: Batches) -> None:
        gradients = self.gradients(model, _first_batches(batches))
        for name, layer in lora_layers(model).items():
            rank = layer.r["default"]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            gradient = gradients.pop(name).to(a.device)
            u, _, vt = leading_triplets(gradient, 2 * rank, width=4 * rank, iterations=_ITERATIONS)
            length = layer.out_features**0.25 / _GAMMA**0.5
            with torch.no_grad():
                a.copy_(length * vt[:rank])
                b.copy_(length * u[:, rank:])
            subtract_from_base(layer)


@dataclass(frozen=True)
class GradientA(Lora):
    """A as LoRA-GA has it, with rows of length one, and B = 0: the base weights stay.

    The gradient of the loss by B is then s·G·Aᵀ with the mean gradient G, and no other A with
    orthonormal rows makes it larger: the first steps go down as much of G as the rank holds.
    """

    fits_quantized: ClassVar[bool] = False
    fits_shards: ClassVar[bool] = False
    linear_only: ClassVar[bool] = True

    @torch.no_grad()
    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        with evaluation_state(model):
            torch.manual_seed(preparation.seed)
            gradients = self.gradients(model, _first_batches(preparation.batches))
        for name, a in rows_of_a(model).items():
            gradient = gradients.pop(name).to(a.device)
            _, _, vt = leading_triplets(gradient, len(a), width=4 * len(a), iterations=_ITERATIONS)
            a.copy_(vt)
        return None


@dataclass(frozen=True)
class PeftLoraGA(LoraGA):
    """The start that PEFT 0.21.2 calls LoRA-GA, of the same gradients.

    It leaves A at rows of length one, and multiplies B by the gradient's singular values, so that
    BA is far smaller than the authors' wherever gradients are.
    """

    def apply(self, model: Any, batches: Batches) -> None:
        options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
        config = peft_config(model, **options)
        gradients = self.gradients(model, _first_batches(batches))
        for name, layer in lora_layers(model).items():
            base = layer.get_base_layer()
            # Where PEFT's start looks for what its `preprocess_loraga` puts there.
            base._peft_loraga_grad = gradients.pop(name).to(base.weight.device)
        initialize_by_peft(model, config)


METHODS = (
    LoraGA(
        "lora-ga",
        {"use_rslora": True},
        least_width=2,
        about="A and B from singular vectors of the gradient",
        source="Wang et al. 2024, arXiv 2407.05000",
    ),
    GradientA(
        "gradient-a",
        least_width=1,
        about="LoRA-GA's A alone: unit rows, B = 0",
    ),
    # On Conv1D PEFT takes the width of the input for that of the output in the length of B.
    PeftLoraGA(
        "lora-ga-peft",
        least_width=2,
        conv1d=False,
        about="LoRA-GA as PEFT has it",
        source="PEFT 0.21.2",
    ),
)
