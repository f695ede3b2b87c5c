"""LoRA-GA."""

from __future__ import annotations

from pathlib import Path

import torch

from evatune.adapters.lora_layers import lora_layers
from evatune.sketch.spectrum import principal_angles
from tests.finetune.helpers import RANK, MethodCase

torch.set_num_threads(1)


def test_the_directions_of_lora_ga_are_those_of_the_losss_gradient(tmp_path: Path) -> None:
    case = MethodCase("llama")
    model = case.model()
    batches = list(case.of(2))
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    for name, layer in lora_layers(case.started("lora-ga", tmp_path / "start")).items():
        u, _, vt = torch.linalg.svd(model.get_submodule(name).weight.grad, full_matrices=False)
        b = torch.nn.functional.normalize(layer.lora_B["default"].weight, dim=0)
        assert principal_angles(layer.lora_A["default"].weight, vt[:RANK]).max() < 0.05
        assert principal_angles(b.T, u[:, RANK : 2 * RANK].T).max() < 0.05
