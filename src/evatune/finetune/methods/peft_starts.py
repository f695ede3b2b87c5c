"""Starts that PEFT computes from W alone: PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from evatune.finetune.methods.base import Batches
from evatune.finetune.methods.weight_init import WeightInit, initialize_by_peft, peft_config


@dataclass(frozen=True)
class PeftStart(WeightInit):
    """A start of PEFT's.

    Attributes:
        start: as PEFT's `init_lora_weights` names it.
    """

    start: str = field(kw_only=True)

    def apply(self, model: Any, batches: Batches) -> None:
        initialize_by_peft(model, peft_config(model, init_lora_weights=self.start))


METHODS = (
    PeftStart(
        "pissa",
        start="pissa",
        least_width=1,
        about="B·A is the largest singular triplets of W",
        source="Meng et al. 2024, arXiv 2404.02948",
    ),
    PeftStart(
        "olora",
        start="olora",
        least_width=1,
        conv1d=False,
        about="B·A is a part of W by its QR",
        source="Büyükakyüz 2024, arXiv 2406.01775",
    ),
)
