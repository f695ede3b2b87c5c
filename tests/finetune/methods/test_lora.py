"""LoRA, and its variants that are options of PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import ALPHA, MethodCase

torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "power"), [("lora", 1), ("lora-orthogonal", 1), ("mica", 1), ("rslora", 0.5)]
)
@pytest.mark.parametrize("rank", [2, 4])
def test_the_adapter_is_scaled_by_alpha_over_the_rank_or_its_root(
    method: str, power: float, rank: int, tmp_path: Path
) -> None:
    model = MethodCase("llama").started(method, tmp_path / "start", rank=rank)
    for name, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.copy_(torch.randn_like(a))
        b.copy_(torch.randn_like(b))
        x = torch.randn(3, a.shape[1])
        added = layer(x) - layer.get_base_layer()(x)
        assert torch.allclose(added, ALPHA / rank**power * x @ a.T @ b.T, atol=1e-4), name


@torch.no_grad()
def test_dora_keeps_the_length_of_every_row_of_the_weight_until_it_learns_it(
    tmp_path: Path,
) -> None:
    model = MethodCase("llama").started("dora", tmp_path / "start")
    for name, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.copy_(torch.randn_like(b))
        whole = layer.get_base_layer().weight
        turned = whole + layer.scaling["default"] * b @ a
        expected = turned * (whole.norm(dim=1) / turned.norm(dim=1))[:, None]
        assert torch.allclose(layer(torch.eye(a.shape[1])).T, expected, atol=1e-5), name


@torch.no_grad()
def test_mica_learns_in_the_least_directions_of_the_output_alone(tmp_path: Path) -> None:
    model = MethodCase("llama").started("mica", tmp_path / "start")
    for name, layer in lora_layers(model).items():
        b = layer.lora_B["default"].weight.double()
        whole = layer.get_base_layer().weight.double()
        least = torch.linalg.svdvals(whole)[-b.shape[1] :]
        assert torch.allclose((b.T @ whole).norm(dim=1), least, atol=1e-5), name
        assert layer.lora_A["default"].weight.requires_grad
        assert not layer.lora_B["default"].weight.requires_grad
