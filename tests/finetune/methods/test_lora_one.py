"""LoRA-One."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.finetune.helpers import PlantedGradient

torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize("conv1d", [False, True])
def test_lora_one_by_hand(conv1d: bool, tmp_path: Path) -> None:
    # Singular values 8, 4, 2, 0.5 at inputs 0, 1, 2, 3 and outputs 5, 9, 3, 7; the third is < 0.
    case = PlantedGradient(conv1d=conv1d)
    layer = case.started("lora-one", rank=3, alpha=6, start=tmp_path / "start")
    a, b = torch.zeros(3, 4), torch.zeros(16, 3)
    a[0, 0], a[1, 1], a[2, 2] = 1, 0.5**0.5, 0.5  # √(Σ/8), Σ of the negative gradient
    b[5, 0], b[9, 1], b[3, 2] = -1, -(0.5**0.5), 0.5
    assert torch.allclose(layer.lora_A["default"].weight, a / 128**0.5, atol=1e-6)
    assert torch.allclose(layer.lora_B["default"].weight, b / 128**0.5, atol=1e-6)
    base = layer.get_base_layer().weight
    assert torch.equal(base.T if conv1d else base, case.weight)
    step = torch.zeros(16, 4)  # downhill, -α/(√r γ) G/8
    step[5, 0], step[9, 1], step[3, 2] = -1, -0.5, 0.25
    added = layer(torch.eye(4)).T - case.weight
    assert torch.allclose(added, 6 / 3**0.5 / 128 * step, atol=1e-6)
