"""EVA and its variants."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evatune import initialize
from evatune.adapters.lora_layers import lora_layers
from evatune.finetune.methods import METHODS, Preparation
from tests.finetune.helpers import RANK, MethodCase

torch.set_num_threads(1)


def test_eva_rho1_gives_every_layer_the_same_rank(tmp_path: Path) -> None:
    layers = lora_layers(MethodCase("bert").started("eva-rho1", tmp_path / "start"))
    assert {layer.r["default"] for layer in layers.values()} == {RANK}


def test_random_directions_have_the_ranks_of_eva_and_see_as_much_energy(tmp_path: Path) -> None:
    case = MethodCase("llama")
    eva, control = (
        lora_layers(case.started(method, tmp_path / method))
        for method in ("eva-paper-centered", "eva-paper-random")
    )
    moments = second_moments(case)
    for path, layer in control.items():
        a, of_eva = layer.lora_A["default"].weight, eva[path].lora_A["default"].weight
        assert a.shape == of_eva.shape
        energy = (of_eva @ moments[path] * of_eva).sum()
        square = (energy * a.shape[1] / moments[path].trace() / len(a)).expand(len(a))
        torch.testing.assert_close(a @ a.T, square.diag(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora-redist", "eva-paper-random"])
def test_controls_pass_over_a_layer_that_was_left_without_a_rank(
    method: str, tmp_path: Path
) -> None:
    case = MethodCase("llama")
    model = case.adapted(method)
    without, *others = lora_layers(model).values()

    def initialize_but_one(**options: Any) -> Any:
        calibration = initialize(model, case.batches, **options)
        without.delete_adapter("default")
        return calibration

    case.prepare(model, method, tmp_path, initialize_but_one)
    assert "default" not in without.lora_A
    assert all(layer.lora_A["default"].weight.any() for layer in others)


@torch.no_grad()
def second_moments(case: MethodCase) -> dict[str, Tensor]:
    """Return E[x xᵀ] (d, d) of the input of each target layer, over the tokens of all batches."""
    model, rows = case.adapted("lora"), defaultdict[str, list[Tensor]](list)
    for path, layer in lora_layers(model).items():
        layer.register_forward_pre_hook(
            lambda _, inputs, path=path: rows[path].append(inputs[0].flatten(0, -2))
        )
    for batch in case.batches:
        model(**batch)
    whole = {path: torch.cat(parts) for path, parts in rows.items()}
    return {path: x.T @ x / len(x) for path, x in whole.items()}


def test_the_recipes_scale_is_evas_and_its_variants_keep_their_own(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    preparation = Preparation(
        initialize=lambda **options: asked.update(options),  # type: ignore[arg-type, return-value]
        initialize_elsewhere=lambda **_: None,  # type: ignore[arg-type, return-value]
        batches=lambda size: [],
        seed=0,
        initial_adapter=tmp_path,
        options={"rho": 2, "scale": "whiten-matched"},
    )
    for name, scale in (("eva", "whiten-matched"), ("eva-whiten", "whiten")):
        METHODS[name].prepare(None, preparation)
        assert asked["scale"] == METHODS[name].scale("whiten-matched") == scale
    for name, scale in (("eva-centered", "matched"), ("eva-paper-centered", "paper")):
        METHODS[name].prepare(None, preparation)
        assert asked["scale"] == scale
        assert asked["config"].center
    assert METHODS["eva-minor"].scale("paper") is None
