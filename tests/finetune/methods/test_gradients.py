"""The mean gradient of the loss by the weights."""

from __future__ import annotations

import pytest
import torch

from evatune.adapters.lora_layers import lora_layers
from evatune.errors import DataError
from evatune.finetune.methods.gradients import mean_gradients
from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_mean_is_that_of_plain_backward_passes(kind: str) -> None:
    case = MethodCase(kind)
    model = case.adapted("lora")
    layers = lora_layers(model)
    reference = case.adapted("lora")
    torch.manual_seed(3)  # dropout is on
    found = mean_gradients(model, layers, case.batches)
    torch.manual_seed(3)
    expected = lora_layers(reference.train())
    for layer in expected.values():
        layer.get_base_layer().weight.requires_grad_(True)
    for batch in case.batches:
        (reference(**batch).loss / len(case.batches)).backward()
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        gradient = layer.get_base_layer().weight.grad
        gradient = gradient.T if kind == "gpt2" else gradient
        assert torch.allclose(found[name], gradient, atol=1e-7), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_dropped_while_the_backward_pass_goes_on() -> None:
    case = MethodCase("llama")
    model = case.adapted("lora")
    layers = lora_layers(model)
    kept = []

    def look(*_: object) -> None:
        weights = [layer.get_base_layer().weight for layer in layers.values()]
        kept.append(sum(weight.grad is not None for weight in weights))

    # fires once the last block is done with
    model.base_model.model.model.layers[1].register_full_backward_hook(look)
    mean_gradients(model, layers, case.batches[:1])
    assert kept == [0]


def test_a_gradient_that_is_not_finite_is_named() -> None:
    case = MethodCase("bert")
    model = case.adapted("lora")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.fill_(float("nan"))
    with pytest.raises(DataError, match=r"by the weights of bert\.\S+ is not finite \(NaN or inf"):
        mean_gradients(model, lora_layers(model), case.batches)
