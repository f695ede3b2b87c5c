"""The model, its batches and random states come back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune.calibration.progress import Progress
from tests.helpers import EXACT, Toy, inputs, state_of, tiny_llama, tokens

torch.set_num_threads(1)


class Failing(Toy):
    """Raises in the middle of its third forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        x = self.blocks[0](x)
        if self.calls == 3:
            raise RuntimeError("the model broke")
        return self.blocks[1](x)


@pytest.mark.parametrize("model", [Toy, Failing])
def test_model_batches_and_random_states_come_back_as_they_were(model: type[Toy]) -> None:
    net = model()
    net.train()
    net.blocks[0].eval()
    net.blocks[1].q.weight.requires_grad_(False)
    net(inputs()[0]).sum().backward()
    net.blocks[0].q.register_forward_pre_hook(lambda module, args: None)
    xs = inputs()
    batches = [{"x": x, "attention_mask": torch.ones(4, x.shape[1])} for x in xs]
    copies = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    before = state_of(net)
    weights = {name: p.clone() for name, p in net.named_parameters()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)

    def noisy() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            torch.rand(3), random.random(), np.random.rand()
            yield batch

    if model is Failing:
        with pytest.raises(RuntimeError, match="the model broke"):
            evatune.calibrate(net, noisy(), EXACT)
    else:
        evatune.calibrate(net, noisy(), EXACT)
    assert state_of(net) == before
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    for batch, copy in zip(batches, copies, strict=True):
        assert batch.keys() == copy.keys()
        assert all(torch.equal(batch[key], copy[key]) for key in copy)


def test_an_exception_in_the_data_leaves_the_model_alone() -> None:
    net = Toy().train()
    before = state_of(net)

    def broken() -> Iterator[Tensor]:
        yield from inputs(2)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        evatune.calibrate(net, broken())
    assert state_of(net) == before


def test_torchs_own_transformer_layers_are_not_passed_by() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=True
    ).eval()
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, 7:] = True
    batch = {"src": torch.randn(4, 10, 16), "src_key_padding_mask": mask}
    before = torch.backends.mha.get_fastpath_enabled()
    calibration = evatune.calibrate(model, [batch] * 4, EXACT, targets=["linear1", "linear2"])
    assert all(status.usable for status in calibration.status.values())
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_forward_passes_of_others_are_not_counted() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")).train()
    prompts = [batch["input_ids"] for batch in tokens(4)]
    seen: list[tuple[bool, bool, bool, int]] = []

    def note(*_: Any) -> None:
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        hooks = len(layer.base_layer._forward_pre_hooks)
        seen.append((model.training, torch.is_grad_enabled(), layer._disable_adapters, hooks))

    def on_policy() -> Iterator[dict[str, Tensor]]:
        for ids in prompts:
            note()
            made = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
            model(input_ids=made).logits.sum().backward()  # nothing forbids it
            yield {"input_ids": ids}

    def progress(now: Progress) -> None:
        note()
        model(prompts[0])

    calibration = evatune.calibrate(model, on_policy(), EXACT, progress=progress)
    assert {spectrum.rows for spectrum in calibration.spectra.values()} == {4 * 4 * 12}
    # As the caller's: with adapters, in training, recording gradients, without a hook.
    assert set(seen) == {(True, True, False, 0)}


def test_a_generator_that_fails_or_changes_modes_leaves_the_model_as_it_was() -> None:
    net = Toy().train()
    before = state_of(net)

    def broken() -> Iterator[Tensor]:
        for x in inputs(2):
            net.eval()
            net(x)
            yield x
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        evatune.calibrate(net, broken(), EXACT)
    assert state_of(net) == before


def test_a_precision_for_all_products_still_reaches_those_of_matrices() -> None:
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        pytest.skip("torch < 2.9 has one setting for products of float32")
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = backends.fp32_precision
    try:
        for each in products:  # whatever another test has told them
            each.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        evatune.calibrate(Toy(), inputs(2), EXACT, progress=None)
        assert [each.fp32_precision for each in products] == ["tf32", "tf32"]
        backends.fp32_precision = "ieee"
        assert [each.fp32_precision for each in products] == ["ieee", "ieee"]
    finally:
        backends.fp32_precision = before


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_precision_of_products_of_matrices_comes_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        evatune.calibrate(Toy(), inputs(2), EXACT, progress=None)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
