"""Writing into PEFT's LoRA layers; plain PEFT's own loader is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model

import evatune
from tests.helpers import (
    lora,
    lora_layers,
    output,
    tiny_bert,
    tiny_llama,
    tokens,
    train_a_little,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    ],
    ids=["lora", "rslora", "dora", "eva"],
)
@pytest.mark.parametrize("meta", [False, True], ids=["", "low_cpu_mem_usage"])
def test_round_trip_through_plain_peft(
    tmp_path: Path, build: Any, options: dict[str, Any], meta: bool
) -> None:
    batch = tokens()[0]
    before = output(build(), batch)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    model = get_peft_model(build(), LoraConfig(**settings), low_cpu_mem_usage=meta)
    calibration = evatune.initialize(model, tokens(8), scale="paper")
    assert torch.allclose(output(model, batch), before, atol=1e-5)

    plan = calibration.allocate()
    layers = lora_layers(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        n: r for n, r in plan.ranks.items() if r
    }
    scale = 8 / 4**0.5 if options.get("use_rslora") else 8 / 4
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(scale)
        assert torch.equal(
            layer.lora_A["default"].weight, calibration.spectra[name].directions[: plan.ranks[name]]
        )
        assert not layer.lora_B["default"].weight.any()
        assert layer.lora_A["default"].weight.requires_grad

    losses = train_a_little(model, batch)
    assert losses[-1] < losses[0]
    trained = output(model, batch)
    assert not torch.allclose(trained, before, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), str(tmp_path))
    assert torch.allclose(output(again, batch), trained, atol=1e-6)
    assert {name: layer.r["default"] for name, layer in lora_layers(again).items()} == {
        n: r for n, r in plan.ranks.items() if r
    }


def test_the_bare_model_and_the_peft_model_give_the_same_calibration() -> None:
    config = evatune.CalibrationConfig(rank=4)
    bare = evatune.calibrate(tiny_bert(), tokens(8), config)
    adapted = lora(tiny_bert())
    through = evatune.calibrate(adapted, tokens(8), config)
    written = evatune.initialize(adapted, tokens(8), config=config)
    for other in (through, written):
        assert list(other.spectra) == list(bare.spectra)
        for name, spectrum in bare.spectra.items():
            assert torch.equal(other.spectra[name].directions, spectrum.directions)
            assert torch.equal(other.spectra[name].energies, spectrum.energies)


def test_another_adapter_is_not_touched(tmp_path: Path) -> None:
    batch = tokens()[0]
    model = lora(tiny_bert())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query", "value", "dense"]))
    model.set_adapter("other")
    train_a_little(model, batch)
    expected = output(model, batch)
    weights = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    model.set_adapter("default")
    # raw: the rich inputs take it all
    spread = evatune.CalibrationConfig(rank=4, rho=4.0, metric="raw")
    calibration = evatune.initialize(model, tokens(8), config=spread)
    assert 0 in calibration.allocate().ranks.values()

    assert {n for n, _ in model.named_parameters() if ".other." in n} == set(weights)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    # only "default" is active
    assert torch.allclose(output(model, batch), output(tiny_bert(), batch), atol=1e-5)
    model.set_adapter("other")
    assert torch.allclose(output(model, batch), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    train_a_little(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    assert torch.allclose(output(loaded, batch), output(model, batch), atol=1e-6)


def test_layers_of_rank_zero_carry_no_adapter_and_load_without_one(tmp_path: Path) -> None:
    model = lora(tiny_bert())
    calibration = evatune.initialize(model, tokens(8), rho=4, metric="raw")
    ranks = calibration.allocate().ranks
    assert 0 in ranks.values()
    assert set(lora_layers(model)) == {name for name, rank in ranks.items() if rank}
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    assert set(lora_layers(loaded)) == set(lora_layers(model))
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


@pytest.mark.parametrize("others", [(), ("other",)])
def test_a_bias_of_a_layer_of_rank_zero_is_frozen_as_it_is_not_saved(others: tuple[str]) -> None:
    model = lora(tiny_bert(), bias="lora_only")
    for name in others:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["query", "value", "dense"]))
    ranks = evatune.initialize(model, tokens(8), rho=4, metric="raw").allocate().ranks
    assert 0 in ranks.values()
    for name, rank in ranks.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        assert base.bias.requires_grad == (rank > 0), name


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_an_optimizer_that_is_there_already_trains_what_has_a_rank(options: dict[str, Any]) -> None:
    model = lora(tiny_bert(), **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ranks = evatune.initialize(model, tokens(8), rho=4, metric="raw").allocate().ranks
    assert len(set(ranks.values())) > 2
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(id(parameter) in held for parameter in trained.values())
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for _ in range(2):
        hidden, pooled = model(**tokens()[0])[:2]
        (hidden.sin().mean() + pooled.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in trained.items() if "_A." in name)


@pytest.mark.parametrize("training", [False, True])
def test_layers_with_another_rank_are_in_the_mode_that_they_were_in(training: bool) -> None:
    model = lora(tiny_bert(), lora_dropout=0.5).train(training)
    ranks = evatune.initialize(model, tokens(8), rho=4, metric="raw").allocate().ranks
    assert len(set(ranks.values())) > 2
    assert {module.training for module in model.modules()} == {training}


def test_adapter_weights_keep_the_precision_peft_chose() -> None:
    model = lora(tiny_bert().to(torch.bfloat16))
    kinds = {layer.lora_A["default"].weight.dtype for layer in lora_layers(model).values()}
    evatune.initialize(model, tokens(8))
    for layer in lora_layers(model).values():
        assert {layer.lora_A["default"].weight.dtype, layer.lora_B["default"].weight.dtype} == kinds


def test_a_transformers_model_with_add_adapter_works_too() -> None:
    model = tiny_bert()
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]), adapter_name="default")
    calibration = evatune.initialize(model, tokens(8))
    assert sum(calibration.allocate().ranks.values()) == 4 * 4


def test_gpt2_round_trip(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ).eval()

    model = get_peft_model(
        build(), LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True)
    )
    evatune.initialize(model, tokens(8))
    train_a_little(model, tokens()[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path))
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


def test_adjust_scaling_factors_off_leaves_alpha_alone() -> None:
    eva = EvaConfig(rho=2.0, adjust_scaling_factors=False)
    model = lora(tiny_bert(), init_lora_weights="eva", eva_config=eva)
    evatune.initialize(model, tokens(8))
    assert {layer.lora_alpha["default"] for layer in lora_layers(model).values()} == {8}


# -- scales ----------------------------------------------------------------------------------------


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_a_second_call_leaves_the_scale_as_it_is(rslora: bool) -> None:
    model = lora(tiny_bert(), use_rslora=rslora)
    for _ in range(3):
        evatune.initialize(model, tokens(8), rank=4)
    scales = [layer.scaling["default"] for layer in lora_layers(model).values()]
    assert scales == pytest.approx([8 / 4**0.5 if rslora else 8 / 4] * len(scales))


def test_a_bias_of_b_starts_at_zero_too() -> None:
    batch = tokens()[0]
    before = output(tiny_bert(), batch)
    model = lora(tiny_bert(), lora_bias=True)
    evatune.initialize(model, tokens(8))
    assert torch.allclose(output(model, batch), before, atol=1e-5)


def test_frozen_parameters_of_other_adapters_stay_frozen() -> None:
    model = lora(tiny_bert())
    model.add_adapter("b", LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".b." in name)
    evatune.initialize(model, tokens(8), adapter_name="b")
    assert all(
        parameter.requires_grad == (".b." in name) for name, parameter in model.named_parameters()
    )


def test_magnitudes_of_dora_keep_their_dtype() -> None:
    model = lora(tiny_bert().to(torch.bfloat16), use_dora=True)
    before = {name: p.dtype for name, p in model.named_parameters() if "magnitude" in name}
    evatune.initialize(model, tokens(8))
    after = {name: p.dtype for name, p in model.named_parameters() if "magnitude" in name}
    assert after.items() <= before.items()
