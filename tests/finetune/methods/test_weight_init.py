"""Methods that move a part of the base weights into the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from evatune.adapters.lora_layers import lora_layers
from evatune.errors import ConfigError
from evatune.finetune.methods import METHODS
from evatune.finetune.methods.weight_init import WeightInit
from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


STARTS = [name for name, method in METHODS.items() if isinstance(method, WeightInit)]
LAYER_TYPES = ["bert", "llama", "gpt2", "dinov2"]

WHERE = [
    (name, kind)
    for name in STARTS
    for kind in LAYER_TYPES
    if kind != "gpt2" or METHODS[name].conv1d
]


# LoRA-One leaves the base as it is, and reads the same gradients.
WHERE_OR_GRADIENTS = [*WHERE, ("lora-one", "bert"), ("lora-one", "gpt2")]


@pytest.mark.parametrize(("method", "kind"), WHERE_OR_GRADIENTS)
def test_a_saved_adapter_fits_the_base_as_it_was(method: str, kind: str, tmp_path: Path) -> None:
    case = MethodCase(kind)
    model = case.started(method, tmp_path / "start")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for batch in case.batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = case.logits(model)
    assert not torch.allclose(trained, case.logits(case.model()), atol=1e-4)
    METHODS[method].save(model, tmp_path / "adapter", tmp_path / "start")
    loaded = PeftModel.from_pretrained(case.model(), str(tmp_path / "adapter")).eval()
    assert torch.allclose(case.logits(loaded), trained, atol=1e-6)


@pytest.mark.parametrize(("method", "kind"), WHERE_OR_GRADIENTS)
def test_a_start_leaves_modes_gradients_and_random_numbers_alone(
    method: str, kind: str, tmp_path: Path
) -> None:
    case = MethodCase(kind)
    model = case.adapted(method)
    model.base_model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    random = torch.random.get_rng_state()
    case.prepare(model, method, tmp_path / "start")
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in model.modules()
    )
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not {"eigens", "covariance_matrix", "sample_count", "_peft_loraga_grad"} & {
        key for module in model.modules() for key in vars(module)
    }


@pytest.mark.parametrize(
    ("method", "size", "most"), [("corda", 1, 256), ("lora-ga", 2, 64), ("lora-one", 1, 8)]
)
def test_a_pass_over_data_is_bounded(method: str, size: int, most: int, tmp_path: Path) -> None:
    case = MethodCase("llama")
    model = case.adapted(method, targets=["v_proj"])
    read = []

    def endless(asked: int) -> Iterator[dict[str, Tensor]]:
        while True:
            read.append(asked)
            yield next(case.of(asked))

    case.prepare(model, method, tmp_path / "start", batches=endless)
    assert read == [size] * most


@pytest.mark.parametrize("method", STARTS)
def test_a_start_that_is_there_gives_the_same_base_without_data(
    method: str, tmp_path: Path
) -> None:
    case, other = MethodCase("bert"), MethodCase("bert")
    first = case.started(method, tmp_path / "start")
    other.batches = []
    again = other.prepared(other.adapted(method), method, tmp_path / "start")
    assert first.state_dict().keys() == again.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.allclose(value, again.state_dict()[name], atol=1e-7), name


@pytest.mark.parametrize("method", STARTS)
def test_a_16_bit_base_keeps_its_dtype_and_nearly_its_output(method: str, tmp_path: Path) -> None:
    case = MethodCase("llama")
    whole = case.model().to(torch.bfloat16)
    case.model = lambda: whole
    before = case.logits(whole)
    model = case.started(method, tmp_path / "start")
    assert {layer.get_base_layer().weight.dtype for layer in lora_layers(model).values()} == {
        torch.bfloat16
    }
    assert {layer.lora_A["default"].weight.dtype for layer in lora_layers(model).values()} == {
        torch.float32
    }
    assert torch.allclose(case.logits(model), before, atol=0.02)


@pytest.mark.parametrize("method", ["corda", "lora-ga", "lora-ga-peft", "lora-one"])
def test_a_layer_that_the_data_never_reaches_is_named(method: str, tmp_path: Path) -> None:
    case = MethodCase("llama")
    model = case.model()
    model.model.layers[1].unused = torch.nn.Linear(16, 16)
    case.model = lambda: model
    with pytest.raises(
        ConfigError,
        match=f"'{method}' learns nothing about model.layers.1.unused: the training data",
    ):
        case.started(method, tmp_path / "start")
