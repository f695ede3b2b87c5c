"""EVA and its variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from evatune.adapters.lora_layers import lora_layers
from evatune.finetune.methods import METHODS, Preparation
from tests.finetune.helpers import RANK, MethodCase

torch.set_num_threads(1)


def test_eva_rho1_gives_every_layer_the_same_rank(tmp_path: Path) -> None:
    layers = lora_layers(MethodCase("bert").started("eva-rho1", tmp_path / "start"))
    assert {layer.r["default"] for layer in layers.values()} == {RANK}


def test_the_recipes_scale_is_evas_and_its_variants_keep_their_own(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    preparation = Preparation(
        initialize=lambda **options: asked.update(options),  # type: ignore[arg-type, return-value]
        initialize_elsewhere=lambda **_: None,  # type: ignore[arg-type, return-value]
        batches=lambda size: [],
        rho=2,
        seed=0,
        initial_adapter=tmp_path,
        scale="whiten-matched",
    )
    for name, scale in (("eva", "whiten-matched"), ("eva-whiten", "whiten")):
        METHODS[name].prepare(None, preparation)
        assert asked["scale"] == METHODS[name].scale("whiten-matched") == scale
    for name, scale in (("eva-centered", "matched"), ("eva-paper-centered", "paper")):
        METHODS[name].prepare(None, preparation)
        assert asked["scale"] == scale
        assert asked["config"].center
    assert METHODS["eva-minor"].scale("paper") is None
