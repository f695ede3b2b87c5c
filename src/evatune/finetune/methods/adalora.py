"""AdaLoRA: starts wide and prunes singular triplets while it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import AdaLoraConfig
from torch import nn

from evatune.finetune.methods.base import AdapterSetup, Lora


@dataclass(frozen=True)
class AdaLora(Lora):
    """PEFT's AdaLoRA, planned in the paper's proportions."""

    # PEFT cannot load what was pruned into a fresh adapter, so that a killed run begins again.
    resumable: ClassVar[bool] = False
    fits_shards: ClassVar[bool] = False

    def config(self, setup: AdapterSetup) -> Any:
        rank = setup.adapter.rank
        # 1.5 times the rank at first, pruned to it over the middle part of the run.
        return AdaLoraConfig(
            **setup.lora_options,
            init_r=math.ceil(1.5 * rank),
            target_r=rank,
            total_step=setup.steps,
            tinit=setup.steps // 10,
            tfinal=setup.steps // 3,
            deltaT=max(1, setup.steps // 100),
        )

    def adapt(self, model: nn.Module, setup: AdapterSetup) -> Any:
        adapted = super().adapt(model, setup)
        _keep_penalty_out_of_evaluation(adapted.base_model)
        return adapted

    def after_step(self, model: nn.Module, step: int) -> None:
        model.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]


def _keep_penalty_out_of_evaluation(model: Any) -> None:
    """Switch the penalty on P and Q off while the model evaluates.

    PEFT adds it to every loss, and an evaluation's is compared with those of other methods.
    """
    config = model.peft_config["default"]
    weight = config.orth_reg_weight

    def before(module: nn.Module, *_: Any) -> None:
        config.orth_reg_weight = weight if module.training else 0.0

    def after(*_: Any) -> None:
        config.orth_reg_weight = weight  # as it is to be saved

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


METHODS = (
    AdaLora(
        "adalora", about="starts wide and is pruned while it trains", source="Zhang et al. 2023"
    ),
)
