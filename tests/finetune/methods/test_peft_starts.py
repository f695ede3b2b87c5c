"""PiSSA and OLoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import RANK, MethodCase

torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pissa_moves_the_largest_singular_triplets_into_the_adapter(
    kind: str, tmp_path: Path
) -> None:
    case = MethodCase(kind)
    before = case.model()
    for name, layer in lora_layers(case.started("pissa", tmp_path / "start")).items():
        whole = before.get_submodule(name).weight.double()
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        leading = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        moved = (
            layer.scaling["default"]
            * layer.lora_B["default"].weight.double()
            @ layer.lora_A["default"].weight.double()
        )
        moved = moved.T if kind == "gpt2" else moved  # GPT-2's weights lie transposed
        assert torch.allclose(moved, leading, atol=1e-6), name
        base = layer.get_base_layer().weight.double()
        assert torch.allclose(base + moved, whole, atol=1e-7), name


@torch.no_grad()
def test_oloras_b_is_an_orthonormal_base_of_the_first_columns_and_a_what_w_has_in_it(
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
