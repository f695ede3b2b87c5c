"""CorDA: the adapter starts from W and the second moments of its input. arXiv 2406.05223."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft.tuners.lora.config import CordaConfig
from torch import nn

from evatune.adapters.lora_layers import lora_layers
from evatune.finetune.methods.base import Batches
from evatune.finetune.methods.weight_init import WeightInit, initialize_by_peft, peft_config
from evatune.modeling.forward import call_model
from evatune.utils.extras import extras

_EXAMPLES = 256  # as PEFT's documentation has it


@dataclass(frozen=True)
class Corda(WeightInit):
    """The largest singular triplets of W·C, C the second moments of the input.

    That is the paper's instruction-previewed mode. C is of 256 training examples, or all if there
    are fewer.
    """

    def apply(self, model: Any, batches: Batches) -> None:
        with extras("method 'corda'"):
            from peft.tuners.lora.corda import preprocess_corda

        config = peft_config(model, init_lora_weights="corda", corda_config=CordaConfig())
        layers = {name: layer.get_base_layer() for name, layer in lora_layers(model).items()}

        def run() -> None:
            with _rows_of_one_sample(layers) as shapes:
                # One by one: PEFT scales each by its largest value.
                for batch in islice(batches(1), _EXAMPLES):
                    call_model(model, batch)
            self.require_reached(layers.keys() - shapes.keys())

        preprocess_corda(model, config, run)
        initialize_by_peft(model, config)


@contextmanager
def _rows_of_one_sample(
    layers: Mapping[str, nn.Module],
) -> Iterator[Mapping[str, torch.Size]]:
    """Let every input arrive as (1, rows, d), the one shape that PEFT's covariance is right for.

    A pooler's input is (1, d), of which PEFT would make a number instead of a matrix. Gives the
    shapes of the rows of the layers that were called.
    """
    shapes: dict[str, torch.Size] = {}

    def flatten(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            shapes[name] = inputs[0].shape[:-1]
            return inputs[0].flatten(0, -2)[None], *inputs[1:]

        return hook

    def restore(name: str) -> Callable[..., Any]:
        return lambda module, inputs, output: output.reshape(*shapes[name], -1)

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(flatten(name)))
        handles.append(layer.register_forward_hook(restore(name)))
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


METHODS = (
    Corda(
        "corda",
        least_width=1,
        about="B·A is a part of W by the inputs' covariance",
        source="Yang et al. 2024",
    ),
)
