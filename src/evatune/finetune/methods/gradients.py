"""The mean gradient of the loss by the weights, which LoRA-GA and LoRA-One start from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from evatune.errors import DataError
from evatune.modeling.forward import call_model
from evatune.modeling.loss import loss_in


def mean_gradients(
    model: nn.Module, layers: Mapping[str, LoraLayer], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Return by name the mean over batches of the gradient of the loss by each layer's W.

    The model is put into training mode, dropout and all, as the authors of both methods have it;
    the caller puts modes and random numbers back. No parameter has a gradient afterwards that it
    did not have before.

    Returns:
        (out, in), float32, on the CPU. Layers that no gradient reaches, or none but zeros, are
            left out.

    Raises:
        DataError: a gradient that is not finite.
    """
    # Tied layers have one weight, and one sum.
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    sums: dict[nn.Parameter, Tensor] = {}
    model.train()
    count = 0
    with torch.enable_grad(), _gradients_into(sums, model, weights.values()):
        for batch in batches:
            loss_in(call_model(model, batch)).backward()
            count += 1
    means = {}
    for name, weight in weights.items():
        total = sums.get(weight)
        if total is None or not total.any():
            continue
        if not total.isfinite().all():
            raise DataError(
                f"the gradient of the loss by the weights of {name} is not finite (NaN or inf); "
                "look for examples without a finite loss, or choose a method that needs no gradient"
            )
        means[name] = (total.T if layers[name].fan_in_fan_out else total) / count
    return means


@contextmanager
def _gradients_into(
    sums: dict[nn.Parameter, Tensor], model: nn.Module, weights: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Let backward passes add the gradients of these weights to `sums`, and compute no others.

    Each is added and dropped as soon as it is complete, so that only one exists at a time beside
    the sums, which are float32 (64 addends in 16 bits would lose the small ones) and lie on the
    CPU.
    """

    def move(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        gradient = weight.grad.to("cpu", torch.float32)
        if weight in sums:
            sums[weight] += gradient
        else:
            # float32 on the CPU comes as it is, and what is to be added to must be ours
            sums[weight] = gradient.clone()
        weight.grad = None

    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in dict.fromkeys(weights):
            weight.requires_grad_(True)
            handles.append(
                weight.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before:
            parameter.requires_grad_(required)
