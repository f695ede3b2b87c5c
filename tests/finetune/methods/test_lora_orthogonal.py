"""LoRA from random orthonormal directions."""

from __future__ import annotations

from pathlib import Path

import torch

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


@torch.no_grad()
def test_rows_are_orthogonal_of_the_length_of_loras_and_random(tmp_path: Path) -> None:
    first, again = (
        lora_layers(MethodCase("llama").started("lora-orthogonal", tmp_path / "start", rank=3))
        for _ in range(2)
    )
    seen = []
    for name, layer in first.items():
        a = layer.lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(3) / 3, atol=1e-6), name
        assert not layer.lora_B["default"].weight.any(), name
        assert torch.equal(a, again[name].lora_A["default"].weight), name
        seen.append(a.flatten()[:8].tolist())
    assert len({tuple(values) for values in seen}) == len(first)


@torch.no_grad()
def test_the_length_is_the_root_mean_square_of_loras_rows(tmp_path: Path) -> None:
    default = lora_layers(MethodCase("llama").adapted("lora", rank=16))
    squares = torch.cat(
        [layer.lora_A["default"].weight.square().sum(1) for layer in default.values()]
    )
    assert abs(float(squares.mean()) - 1 / 3) < 0.02
