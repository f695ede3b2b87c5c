"""LoRA from random orthonormal directions: what EVA's are without the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from evatune.calibration import Calibration
from evatune.finetune.methods.base import Lora, Preparation, rows_of_a
from evatune.scaling import DEFAULT_LENGTH, orthogonal_rows, seeded_generator


@dataclass(frozen=True)
class LoraOrthogonal(Lora):
    """Orthogonal rows of length √(1/3) in random directions for A, and B = 0.

    The control that tells EVA's directions from their being orthogonal. The length is the root mean
    square of that of the rows of LoRA's default A, whose entries are uniform in ±1/√d: so it starts
    with LoRA's step, and has LoRA's learning rate. PEFT's own `init_lora_weights="orthogonal"` is
    something else: neither its A nor its B is zero, only their product, and the rows are not
    orthogonal.
    """

    linear_only: ClassVar[bool] = True

    @torch.no_grad()
    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        generator = seeded_generator(preparation.seed)
        for a in rows_of_a(model).values():
            a.copy_(orthogonal_rows(a.shape, DEFAULT_LENGTH, generator))
        return None


METHODS = (
    LoraOrthogonal(
        "lora-orthogonal", least_width=1, about="LoRA with random orthogonal A", role="control"
    ),
)
