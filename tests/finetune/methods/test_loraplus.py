"""LoRA+."""

from __future__ import annotations

import torch

from evatune.finetune.methods import METHODS
from evatune.finetune.recipe import TrainingOptions
from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


def test_b_learns_at_the_stated_multiple_of_the_rate_of_a() -> None:
    model = MethodCase("llama").adapted("loraplus")
    training = TrainingOptions(learning_rate=0.003, weight_decay=0.1, lora_plus_ratio=16)
    optimizer = METHODS["loraplus"].optimizer(model, training)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {
        (matrix, rates[id(parameter)])
        for name, parameter in model.named_parameters()
        for matrix in ("lora_A", "lora_B")
        if matrix in name
    }
    assert found == {("lora_A", 0.003), ("lora_B", 0.003 * 16)}


def test_every_trainable_weight_is_in_one_group_of_the_optimizer() -> None:
    model = MethodCase("bert").adapted("loraplus")  # whose new head learns beside the adapter
    training = TrainingOptions(learning_rate=0.003, weight_decay=0.1, lora_plus_ratio=16)
    optimizer = METHODS["loraplus"].optimizer(model, training)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_weights_decay_as_much_as_the_run_says() -> None:
    model = MethodCase("llama").adapted("loraplus")
    training = TrainingOptions(learning_rate=0.003, weight_decay=0.1, lora_plus_ratio=16)
    groups = METHODS["loraplus"].optimizer(model, training).param_groups
    assert {group["weight_decay"] for group in groups if group["params"]} == {0.1}
