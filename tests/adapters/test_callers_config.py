"""The caller's LoraConfig stays as it was, whoever shares it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model

import evatune
from evatune.adapters.compat import initialize_lora_eva_weights
from tests.adapters.helpers import GONE, logits, redistributed, train
from tests.helpers import lora_layers, tiny_llama, tokens

torch.set_num_threads(1)


def by_initialize(model: PeftModel, adapter_name: str = "default") -> None:
    evatune.initialize(model, tokens(4), adapter_name=adapter_name)


def by_compat(model: PeftModel, adapter_name: str = "default") -> None:
    initialize_lora_eva_weights(
        model, tokens(4), adapter_name=adapter_name, show_progress_bar=False
    )


@pytest.mark.parametrize(
    ("initialize", "start"), [(by_initialize, True), (by_initialize, "eva"), (by_compat, "eva")]
)
def test_a_config_that_two_models_share_is_as_it_was(
    initialize: Any, start: Any, tmp_path: Path
) -> None:
    eva = EvaConfig(rho=3.0) if start == "eva" else None
    shared = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start, eva_config=eva
    )
    models = [get_peft_model(tiny_llama(), shared) for _ in range(2)]
    before = copy.deepcopy(shared)
    initialize(models[0])
    assert shared == before
    assert models[1].peft_config["default"] is shared
    initialize(models[1])
    assert shared == before
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    for place, model in enumerate(models):
        train(model)
        model.save_pretrained(tmp_path / str(place))
        assert torch.equal(
            logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / str(place)))),
            logits(model),
        )


def test_a_second_adapter_of_the_same_config_is_not_touched(tmp_path: Path) -> None:
    shared = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(), shared)
    model.add_adapter("ref", shared)
    redistributed(model, GONE)
    assert model.peft_config["ref"] is shared
    assert {layer.r["ref"] for layer in lora_layers(model).values()} == {4}
    model.add_adapter("third", shared)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    for name in ("ref", "third"):
        loaded.load_adapter(str(tmp_path / name), name)
        assert {layer.r[name] for layer in lora_layers(loaded).values()} == {4}


def test_nothing_inside_the_new_config_is_the_callers() -> None:
    pattern, excluded = {"v_proj": 2}, {"layers.1.self_attn.v_proj"}
    shared = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern=pattern, exclude_modules=excluded
    )
    model = tiny_llama()
    model.add_adapter(shared)  # transformers' own door keeps the config in a place of its own
    evatune.initialize(model, tokens(4))
    own = model.peft_config["default"]
    assert own is not shared
    assert (shared.rank_pattern, shared.exclude_modules) == (
        {"v_proj": 2},
        {"layers.1.self_attn.v_proj"},
    )
    assert own.exclude_modules is not shared.exclude_modules
    assert own.runtime_config is not shared.runtime_config
