"""EVA and its variants."""

from __future__ import annotations

from pathlib import Path

import torch

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import RANK, MethodCase

torch.set_num_threads(1)


def test_eva_rho1_gives_every_layer_the_same_rank(tmp_path: Path) -> None:
    layers = lora_layers(MethodCase("bert").started("eva-rho1", tmp_path / "start"))
    assert {layer.r["default"] for layer in layers.values()} == {RANK}
