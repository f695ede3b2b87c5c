"""LoRA whose A stays as it starts, so that B learns alone: what is a start worth by itself?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from evatune.calibration import Calibration
from evatune.finetune.methods.base import Lora, Preparation
from evatune.finetune.methods.eva import Eva


@dataclass(frozen=True)
class LoraFA(Lora):
    """LoRA with PEFT's random A, frozen."""

    linear_only: ClassVar[bool] = True

    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        self.freeze(model)
        return None


@dataclass(frozen=True)
class EvaFA(Eva):
    """EVA's A, frozen."""

    linear_only: ClassVar[bool] = True

    def prepare(self, model: Any, preparation: Preparation) -> Calibration | None:
        calibration = super().prepare(model, preparation)
        self.freeze(model)
        return calibration


METHODS = (
    LoraFA(
        "lora-fa",
        about="LoRA with A frozen at its start",
        frozen="A",
        source="Zhang et al. 2023",
    ),
    # All layers keep their rank, so that it has as many parameters as `lora-fa`.
    EvaFA(
        "eva-fa",
        about="control: eva-rho1 with A frozen at its start",
        frozen="A",
        role="control",
        initialize_options={"rho": 1},
    ),
)
