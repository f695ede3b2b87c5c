"""PEFT's names on our engine: what PEFT's own tests of EVA demand, and what they leave out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

import evatune
from evatune.adapters.compat import get_eva_state_dict, initialize_lora_eva_weights
from evatune.capture.row_selection import RowSelector
from tests.adapters.helpers import PREFIX, QUIET, eva_config, with_eva
from tests.helpers import (
    lora_layers,
    output,
    tiny_bert,
    tiny_llama,
    tokens,
    train_a_little,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["get_eva_state_dict", "initialize_lora_eva_weights"])
def test_names_and_defaults_of_the_parameters_are_pefts(name: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(module, name)).parameters
        for module in (evatune.adapters.compat, peft)
    )
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("options", [{"rho": 0.9}, {"tau": -0.1}, {"tau": 1.1}])
def test_settings_out_of_range_are_value_errors(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        eva_config(**options)


def test_it_is_the_same_initialization_as_evatunes_own() -> None:
    ours, compat = with_eva(tiny_bert(), tau=0.9), with_eva(tiny_bert(), tau=0.9)
    evatune.initialize(ours, tokens(8), scale="paper")
    initialize_lora_eva_weights(compat, tokens(8), **QUIET)
    assert ours.peft_config == compat.peft_config
    state = ours.state_dict()
    assert state.keys() == compat.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in compat.state_dict().items())


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_pefts_own_function_takes_our_state_dict(whiten: bool, meta: bool) -> None:
    options: dict[str, Any] = {"rho": 4.0, "whiten": whiten}
    ours, theirs = with_eva(tiny_bert(), meta, **options), with_eva(tiny_bert(), meta, **options)
    state = get_eva_state_dict(ours, tokens(8), **QUIET)
    initialize_lora_eva_weights(ours, eva_state_dict=state)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(state))
    found = lora_layers(theirs)
    assert found.keys() == lora_layers(ours).keys()
    for name, layer in lora_layers(ours).items():
        assert torch.equal(layer.lora_A["default"].weight, found[name].lora_A["default"].weight)
        assert layer.scaling == pytest.approx(found[name].scaling)
    assert torch.allclose(output(ours, tokens()[0]), output(theirs, tokens()[0]), atol=1e-6)


@pytest.mark.parametrize("has_rank_zero", [False, True])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_loading_a_state_dict_with_and_without_a_layer_of_rank_zero(
    has_rank_zero: bool, prefix: str
) -> None:
    model = with_eva(tiny_llama(), target_modules=["q_proj", "v_proj"], rho=1.0)
    name = "model.layers.0.self_attn.q_proj"
    state = {
        prefix + key.removeprefix(PREFIX): value
        for key, value in get_eva_state_dict(model, tokens(8), **QUIET).items()
    }
    if has_rank_zero:
        state[prefix + name] = state[prefix + name][:0]
    before = dict(state)
    initialize_lora_eva_weights(model, eva_state_dict=state)
    assert isinstance(model.base_model.model.get_submodule(name), LoraLayer) != has_rank_zero
    assert len(lora_layers(model)) == 4 - has_rank_zero
    assert state.keys() == before.keys()
    for key, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, state[prefix + key])


@pytest.mark.parametrize("meta", [False, True])
def test_layers_missing_from_the_state_dict_start_as_pefts_default_with_a_warning(
    meta: bool, tmp_path: Path
) -> None:
    model = with_eva(tiny_bert(), meta, target_modules=["query", "key", "word_embeddings"])
    state = get_eva_state_dict(model, tokens(8), **QUIET)
    left = {key: value for key, value in state.items() if "layer.1" not in key}
    with pytest.warns(
        UserWarning, match="initialized with init_lora_weights=True.*layer.1.*word_embeddings"
    ):
        initialize_lora_eva_weights(model, eva_state_dict=left)
    layers = lora_layers(model)
    for name in ("encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.key"):
        a = layers[name].lora_A["default"].weight
        assert a.shape == (4, 16)
        assert a.any()
        assert a.abs().max() <= 1 / 16**0.5
    assert torch.allclose(output(model, tokens()[0]), output(tiny_bert(), tokens()[0]), atol=1e-6)
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("build", "targets", "batches"),
    [
        (tiny_bert, ["word_embeddings"], tokens(2)),
        (tiny_llama, ["embed_tokens"], iter(tokens(2))),
    ],
)
def test_targets_that_pefts_eva_does_not_know_start_as_pefts_default_with_a_warning(
    build: Any, targets: list[str], batches: Any
) -> None:
    assert get_eva_state_dict(build(), batches, eva_config(target_modules=targets), **QUIET) == {}
    model = with_eva(build(), target_modules=targets)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name
    }
    with pytest.warns(
        UserWarning,
        match="initialized with init_lora_weights=True because they were not found in the eva",
    ):
        initialize_lora_eva_weights(model, batches, **QUIET)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.peft_config["default"].target_modules == set(targets)


def test_an_empty_state_dict_leaves_every_layer_to_peft() -> None:
    model = with_eva(tiny_bert(), target_modules=["query"])
    with pytest.warns(UserWarning, match="init_lora_weights=True"):
        initialize_lora_eva_weights(model, eva_state_dict={})
    assert len(lora_layers(model)) == 2


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("adjust", [False, True])
def test_the_scale_is_unchanged_with_adjust_scaling_factors(
    adjust: bool, rslora: bool, tmp_path: Path
) -> None:
    model = with_eva(tiny_bert(), adjust_scaling_factors=adjust, use_rslora=rslora)
    before = {layer.scaling["default"] for layer in lora_layers(model).values()}
    initialize_lora_eva_weights(model, tokens(8), **QUIET)
    model.save_pretrained(tmp_path)
    for found in (model, PeftModel.from_pretrained(tiny_bert(), str(tmp_path))):
        after = {round(layer.scaling["default"], 9) for layer in lora_layers(found).values()}
        assert (after == {round(value, 9) for value in before}) == adjust


# -- labels ----------------------------------------------------------------------------------------


def labeled(value: int = -100) -> list[dict[str, Tensor]]:
    """Only the last four labels of each text count."""
    batches = tokens(8)
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :-4] = value
    return batches


@pytest.mark.parametrize("value", [-100, -7])
@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("door", ["compat", "initialize"])
def test_the_label_mask_of_the_adapters_config_is_honoured(
    door: str, use: bool, value: int
) -> None:
    batches = labeled(value)
    options: dict[str, Any] = {
        "use_label_mask": use,
        "label_mask_value": value,
        "tau": 1.0,
        "target_modules": ["q_proj"],
    }
    model = with_eva(tiny_llama(), **options)
    without_loss = lambda model, batch: model(batch["input_ids"])  # noqa: E731  -7 is no label that a loss knows
    if door == "compat":
        initialize_lora_eva_weights(model, batches, forward_fn=without_loss, **QUIET)
    else:
        evatune.initialize(model, batches, forward=without_loss, scale="paper")
    kept = slice(-5, -1) if use else slice(None)  # position t predicts label t + 1
    expected = evatune.calibrate(
        tiny_llama(),
        tokens(8),
        evatune.CalibrationConfig(rank=4, tolerance=0.01 if door == "initialize" else 0),
        targets=["q_proj"],
        rows=lambda x, batch, name: x[:, kept].reshape(-1, x.shape[-1]),
    )
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight
        assert torch.allclose(a, expected.spectra[name].directions[: len(a)], atol=1e-4)


def test_a_config_of_the_callers_own_overrides_the_adapters_label_mask() -> None:
    model = with_eva(tiny_llama())
    calibration = evatune.initialize(
        model, labeled(), config=evatune.CalibrationConfig(labels_only=False)
    )
    assert calibration.config.labels_only is False
    assert next(iter(calibration.spectra.values())).rows == 48 * calibration.batches


def test_labels_of_whole_texts_and_of_decoders_are_no_token_labels() -> None:
    batch = tokens()[0]
    assert (
        RowSelector.of_batch(batch | {"labels": torch.zeros(4)}, labels_only="auto").index is None
    )
    assert (
        RowSelector.of_batch(batch | {"labels": torch.zeros(4, 3)}, labels_only="auto").index
        is None
    )
    assert len(RowSelector.of_batch(labeled()[0], labels_only="auto").index) == 16  # type: ignore[arg-type]
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=60,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    model = with_eva(t5, target_modules=["q"])
    calibration = evatune.initialize(model, labeled())
    assert (
        calibration.spectra["encoder.block.0.layer.0.SelfAttention.q"].rows
        == 48 * calibration.batches
    )


def test_no_label_mask_without_eva_in_the_config() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    assert evatune.initialize(model, labeled()).config.labels_only is False


# -- saving, and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True])
def test_save_and_load(tmp_path: Path, meta: bool) -> None:
    model = with_eva(tiny_llama(), meta)
    initialize_lora_eva_weights(model, tokens(8), **QUIET)
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=meta)
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: initialize_lora_eva_weights(with_eva(tiny_bert()), [], **QUIET),
            "dataloader is empty",
        ),
        (lambda: initialize_lora_eva_weights(tiny_bert(), tokens()), "must be a PeftModel"),
        (lambda: initialize_lora_eva_weights(with_eva(tiny_bert())), "dataloader is required"),
        (
            lambda: initialize_lora_eva_weights(with_eva(tiny_bert()), tokens(), adapter_name="x"),
            "no adapter 'x'",
        ),
        (
            lambda: initialize_lora_eva_weights(
                get_peft_model(tiny_bert(), LoraConfig(target_modules=["key"])), tokens()
            ),
            "can only be used with `init_lora_weights='eva'`",
        ),
        (
            lambda: initialize_lora_eva_weights(
                with_eva(tiny_bert()), eva_state_dict={"a.b": torch.zeros(4, 16)}
            ),
            "no name in the eva state_dict.*a.b",
        ),
        (
            lambda: initialize_lora_eva_weights(
                with_eva(tiny_bert()),
                eva_state_dict={"encoder.layer.0.attention.self.query": torch.zeros(4, 5)},
            ),
            r"\(4, 5\) for encoder.layer.0.attention.self.query; it must be \(rank, 16\)",
        ),
    ],
)
def test_what_cannot_be_done_is_a_value_error_of_ours(call: Any, text: str) -> None:
    with pytest.raises(evatune.EvatuneError, match=text) as raised:
        call()
    assert isinstance(raised.value, ValueError)


def test_a_trained_adapter_is_refused() -> None:
    model = with_eva(tiny_bert())
    train_a_little(model, tokens()[0])
    with pytest.raises(ValueError, match="already trained"):
        initialize_lora_eva_weights(model, tokens(8), **QUIET)
