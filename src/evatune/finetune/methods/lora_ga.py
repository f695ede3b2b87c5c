"""LoRA-GA: the adapter starts from the gradient of the loss by W. arXiv 2407.05000."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from torch import Tensor

from evatune.adapters.lora_layers import lora_layers
from evatune.finetune.methods.base import Batches
from evatune.finetune.methods.weight_init import WeightInit, initialize_by_peft, peft_config
from evatune.modeling.forward import call_model

_BATCHES, _EXAMPLES = 64, 2  # as PEFT's documentation has it


@dataclass(frozen=True)
class LoraGA(WeightInit):
    """The leading singular vectors of the loss's gradient by W: the first r to A, the next r to B.

    The gradient is the mean over 64 batches of 2 training examples, or over one pass if that is
    less.
    """

    def apply(self, model: Any, batches: Batches) -> None:
        options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
        config = peft_config(model, **options)
        layers = lora_layers(model)
        weights: dict[str, Tensor] = {
            name: layer.get_base_layer().weight for name, layer in layers.items()
        }

        def run() -> None:
            sums: dict[str, Tensor] = {}
            for batch in islice(batches(_EXAMPLES), _BATCHES):
                output = call_model(model, batch)
                loss = output["loss"] if isinstance(output, Mapping) else output[0]
                loss.backward()
                _move_gradients(weights, sums)
            self.require_reached(weights.keys() - sums.keys())
            for name, weight in weights.items():
                # Where PEFT reads it, and divides it by the number of batches.
                weight.grad = sums[name].to(weight.dtype)

        with warnings.catch_warnings():
            # The first layers of a frozen model: their inputs have no gradient, and PEFT counts
            # their outputs' as well.
            message = "Full backward hook is firing"
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
            preprocess_loraga(model, config, run)
        initialize_by_peft(model, config)


def _move_gradients(weights: Mapping[str, Tensor], sums: dict[str, Tensor]) -> None:
    """Add the weights' gradients to `sums`, in float32, and clear them.

    A sum of 64 in 16 bits would lose the small ones.
    """
    for name, weight in weights.items():
        if weight.grad is not None:
            gradient = weight.grad.float()
            sums[name] = sums[name] + gradient if name in sums else gradient
            weight.grad = None


METHODS = (
    # On Conv1D PEFT takes the width of the input for that of the output in the length of B.
    LoraGA("lora-ga", least_width=2, conv1d=False, source="Wang et al. 2024, arXiv 2407.05000"),
)
