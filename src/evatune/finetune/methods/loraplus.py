"""LoRA+: a learning rate for B that is a multiple of A's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from evatune.finetune.methods.base import Lora
from evatune.finetune.recipe import TrainingOptions

RATIO_OF_B = "training.lora_plus_ratio"


@dataclass(frozen=True)
class LoraPlus(Lora):
    """LoRA with PEFT's LoRA+ optimizer."""

    fits_shards: ClassVar[bool] = False
    own_settings: ClassVar[tuple[str, ...]] = (RATIO_OF_B,)

    def optimizer(self, model: nn.Module, training: TrainingOptions) -> Any:
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=training.learning_rate,
            loraplus_lr_ratio=training.lora_plus_ratio,
            loraplus_weight_decay=training.weight_decay,  # PEFT's groups ignore the optimizer's own
        )


METHODS = (LoraPlus("loraplus", about="LoRA with a larger rate for B", source="Hayou et al. 2024"),)
