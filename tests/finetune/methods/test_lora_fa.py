"""LoRA whose A stays as it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize(("frozen", "start"), [("lora-fa", "lora"), ("eva-fa", "eva-rho1")])
def test_the_start_is_that_of_the_method_and_b_alone_can_learn(
    frozen: str, start: str, tmp_path: Path
) -> None:
    usual = lora_layers(MethodCase("llama").started(start, tmp_path / "usual", rank=3))
    layers = lora_layers(MethodCase("llama").started(frozen, tmp_path / "frozen", rank=3))
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight
        assert torch.equal(a, usual[name].lora_A["default"].weight), name
        assert not a.requires_grad, name
        assert layer.lora_B["default"].weight.requires_grad, name
