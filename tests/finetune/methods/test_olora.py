"""OLoRA."""

from __future__ import annotations

from pathlib import Path

import torch

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import RANK, MethodCase

torch.set_num_threads(1)


@torch.no_grad()
def test_b_is_an_orthonormal_base_of_the_first_columns_and_a_what_w_has_in_it(
    tmp_path: Path,
) -> None:
    case = MethodCase("llama")
    before = case.model()
    for name, layer in lora_layers(case.started("olora", tmp_path / "start")).items():
        whole = before.get_submodule(name).weight.double()
        a, b = (getattr(layer, f"lora_{x}")["default"].weight.double() for x in "AB")
        # no QR here: W projected on its first columns, by least squares
        columns = whole[:, :RANK]
        projected = columns @ torch.linalg.lstsq(columns, whole).solution
        assert torch.allclose(b.T @ b, torch.eye(RANK).double(), atol=1e-5), name
        assert torch.allclose(b @ a, projected, atol=1e-5), name
        base = layer.get_base_layer().weight.double()
        assert torch.allclose(base + layer.scaling["default"] * b @ a, whole, atol=1e-7), name
