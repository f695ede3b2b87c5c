"""MiLoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import RANK, MethodCase

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_milora_moves_the_smallest_singular_triplets_into_the_adapter(
    kind: str, tmp_path: Path
) -> None:
    case = MethodCase(kind)
    before = {name: p.detach().clone() for name, p in case.model().named_parameters()}
    for name, layer in lora_layers(case.started("milora", tmp_path / "start")).items():
        whole, base = before[f"{name}.weight"], layer.get_base_layer().weight
        moved = (
            layer.scaling["default"]
            * layer.lora_B["default"].weight
            @ layer.lora_A["default"].weight
        )
        moved = moved.T if kind == "gpt2" else moved
        assert torch.allclose(base + moved, whole, atol=1e-7)
        values = torch.linalg.svdvals(whole.double())
        assert torch.allclose(
            torch.linalg.svdvals(moved.double())[:RANK], values[-RANK:], atol=1e-6
        )
        assert torch.allclose(
            torch.linalg.svdvals(base.double())[:-RANK], values[:-RANK], atol=1e-6
        )
