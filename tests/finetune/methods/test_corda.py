"""CorDA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from evatune.adapters.lora_layers import lora_layers
from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


@torch.no_grad()
def test_corda_leaves_less_than_pissa_of_what_a_layer_does_to_its_inputs(tmp_path: Path) -> None:
    case = MethodCase("bert")
    model = case.model()
    corda, pissa = (lora_layers(case.started(name, tmp_path / name)) for name in ("corda", "pissa"))
    inputs: dict[str, list[Tensor]] = {name: [] for name in corda}
    for name, rows in inputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda m, x, y, rows=rows: rows.append(x[0].flatten(0, -2))
        )
    for batch in case.batches:
        model(**batch)
    for name, rows in inputs.items():
        moment = torch.cat(rows).T @ torch.cat(rows)
        left = [(layers[name].get_base_layer().weight @ moment).norm() for layers in (corda, pissa)]
        assert left[0] < left[1], name
