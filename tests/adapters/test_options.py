"""Options of `evatune.initialize`: the caller's word, the config's, the adapter's."""

from __future__ import annotations

import torch
from peft import EvaConfig

import evatune
from evatune.scaling import scaled_rows
from tests.helpers import (
    lora,
    lora_layers,
    tiny_bert,
    tokens,
)


def test_rank_given_to_initialize_replaces_the_one_of_the_config() -> None:
    model = lora(tiny_bert(), lora_alpha=8)
    calibration = evatune.initialize(model, tokens(8), rank=2, rho=1)
    assert set(calibration.allocate().ranks.values()) == {2}
    layer = next(iter(lora_layers(model).values()))
    assert layer.scaling["default"] == 8 / 2
    assert model.peft_config["default"].r == 2


def test_a_config_without_rank_leaves_rank_and_rho_to_the_adapter() -> None:
    model = lora(tiny_bert(), eva_config=EvaConfig(rho=1.0), init_lora_weights="eva", r=3)
    calibration = evatune.initialize(
        model, tokens(8), config=evatune.CalibrationConfig(center=True)
    )
    assert (calibration.config.rank, calibration.config.rho) == (3, 1.0)
    assert set(calibration.allocate().ranks.values()) == {3}


def test_the_adapters_wish_for_whitening_is_granted() -> None:
    model = lora(tiny_bert(), init_lora_weights="eva", eva_config=EvaConfig(whiten=True))
    calibration = evatune.initialize(model, tokens(8))
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight
        assert torch.allclose(
            a, scaled_rows(calibration.spectra[name], len(a), "whiten"), rtol=1e-4, atol=1e-6
        )
