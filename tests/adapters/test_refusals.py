"""Adapters, calibrations and options that do not go together are refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import evatune
from evatune.calibration import Checkpoint
from evatune.errors import AdapterError, ConfigError
from tests.helpers import Toy, inputs, lora, tiny_bert, tokens, train_a_little

torch.set_num_threads(1)

QUERY = "encoder.layer.{}.attention.self.query"
WeightInit = Callable[[nn.Module], evatune.Calibration]


def lora_of_bert() -> PeftModel:
    return lora(tiny_bert())


def of_bert(**options: Any) -> evatune.Calibration:
    return evatune.calibrate(
        tiny_bert(), tokens(8), evatune.CalibrationConfig(**({"rank": 4} | options))
    )


def not_lora() -> PeftModel:
    from peft import IA3Config

    return get_peft_model(tiny_bert(), IA3Config(target_modules=["query"], feedforward_modules=[]))


def trained(**options: Any) -> PeftModel:
    model = lora(tiny_bert(), **options)
    train_a_little(model, tokens()[0])
    return model


def merged() -> PeftModel:
    model = trained()
    model.merge_adapter()
    return model


def whitening() -> PeftModel:
    return lora(tiny_bert(), init_lora_weights="eva", eva_config=EvaConfig(whiten=True))


def toy() -> PeftModel:
    return get_peft_model(Toy(), LoraConfig(r=4, target_modules=["q", "up"]))


def missing_layer() -> evatune.Calibration:
    found = of_bert()
    return replace(
        found, layers={name: layer for name, layer in found.layers.items() if "query" not in name}
    )


def other_width() -> evatune.Calibration:
    found = of_bert()
    return replace(
        found,
        layers={
            name: replace(layer, spec=replace(layer.spec, in_features=7))
            for name, layer in found.layers.items()
        },
    )


def other_unit() -> evatune.Calibration:
    found = of_bert()
    layers = {
        name: replace(layer, spec=replace(layer.spec, rank_group="x"))
        for name, layer in found.layers.items()
    }
    return replace(found, layers=layers)


@pytest.mark.parametrize(
    ("build", "call", "error", "text"),
    [
        (
            not_lora,
            lambda m: evatune.initialize(m, tokens()),
            AdapterError,
            "IA3Config; EVA initializes LoRA adapters only",
        ),
        (
            trained,
            lambda m: evatune.initialize(m, tokens()),
            AdapterError,
            "already trained.*layer.*overwrite=True",
        ),
        (
            trained,
            lambda m: evatune.initialize(m, of_bert()),
            AdapterError,
            "already trained.*overwrite=True",
        ),
        (
            merged,
            lambda m: evatune.initialize(m, tokens(), overwrite=True),
            AdapterError,
            r"merged.*unmerge_adapter\(\)",
        ),
        (
            merged,
            lambda m: evatune.initialize(m, of_bert(), overwrite=True),
            AdapterError,
            r"merged.*unmerge_adapter\(\)",
        ),
        (
            lambda: trained(init_lora_weights="pissa"),
            lambda m: evatune.initialize(m, tokens(), overwrite=True),
            AdapterError,
            "init_lora_weights='pissa', which changes the base weights.*load the base model again",
        ),
        (
            whitening,
            lambda m: evatune.initialize(m, tokens(), scale="matched"),
            ConfigError,
            "scale is 'matched' but the adapter's EvaConfig says whiten=True; leave out one",
        ),
        (
            whitening,
            lambda m: evatune.initialize(m, tokens(), scale="paper"),
            ConfigError,
            "scale is 'paper' but",
        ),
        (
            toy,
            lambda m: evatune.initialize(m, of_bert()),
            AdapterError,
            "the calibration is one of 'BertModel' and this model is 'Toy'; calibrate this model",
        ),
        (
            lora_of_bert,
            lambda m: evatune.initialize(m, replace(of_bert(), model="BertModel hub/other")),
            AdapterError,
            "'BertModel hub/other' and this model is 'BertModel'.*model=''",
        ),
        (
            lora_of_bert,
            lambda m: evatune.initialize(m, missing_layer()),
            AdapterError,
            (
                f"does not fit this adapter: {QUERY.format(0)}, 16→16, is not in it; calibrate this"
                " model"
            ),
        ),
        (
            lora_of_bert,
            lambda m: evatune.initialize(m, other_width()),
            AdapterError,
            r"query, 16→16, is 7→16 in it",
        ),
        (
            lora_of_bert,
            lambda m: evatune.initialize(m, other_unit()),
            AdapterError,
            "query, 16→16, is 16→16 as a part of x in",
        ),
        (
            lora_of_bert,
            lambda m: evatune.initialize(m, of_bert(rank=2)),
            ConfigError,
            (
                r"rank 4 at rho 2 may give a layer 8 ranks, and the calibration was made for"
                r" 4.*components=8"
            ),
        ),
    ],
)
def test_bad_input_is_one_clear_error_and_the_model_is_as_it_was(
    build: Callable[[], Any], call: WeightInit, error: type[Exception], text: str
) -> None:
    model = build()
    before, config = (
        {name: value.clone() for name, value in model.state_dict().items()},
        str(model.peft_config),
    )
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=text) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert str(model.peft_config) == config
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("config", evatune.CalibrationConfig(center=True)),
        ("forward", lambda model, batch: model(**batch)),
        ("rows", lambda activation, batch, name: activation[:, 0]),
        ("loss", lambda model, batch: model(**batch).last_hidden_state.sum()),
        ("progress", lambda now: None),
        ("checkpoint", Checkpoint(Path("calibration.checkpoint"))),
    ],
)
def test_options_of_a_pass_over_batches_do_not_go_with_a_finished_calibration(
    option: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"{option} is about a pass over batches"):
        evatune.initialize(lora_of_bert(), of_bert(), **{option: value})


def test_a_calibration_of_layers_that_went_wrong_is_refused_with_their_names() -> None:
    few = evatune.calibrate(
        tiny_bert(),
        [{key: value[:1, :3] for key, value in tokens()[0].items()}],
        evatune.CalibrationConfig(rank=4),
    )
    with pytest.raises(evatune.EvatuneError, match=r"3 rows for 8 components"):
        evatune.initialize(lora(tiny_bert()), few)


def test_a_model_of_ones_own_needs_no_name() -> None:
    batches: list[Tensor] = inputs()
    calibration = evatune.calibrate(Toy(), batches, evatune.CalibrationConfig(rank=4))
    used = evatune.initialize(toy(), calibration)
    assert set(used.layers) == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("q", "up")}


def test_whitening_may_be_said_twice() -> None:
    by_config, by_both = whitening(), whitening()
    evatune.initialize(by_config, tokens(8))
    evatune.initialize(by_both, tokens(8), scale="whiten")
    ours, theirs = by_both.state_dict(), by_config.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
