"""EVA beside what else a LoraConfig can say, and what it refuses; plain PEFT's own loader is the
judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import evatune
from tests.helpers import inputs, lora, lora_layers, output, tiny_bert, tokens, train_a_little

torch.set_num_threads(1)

QUERY = "encoder.layer.{}.attention.self.query"
WeightInit = Callable[[nn.Module], evatune.Calibration]


def classifier() -> Any:
    return tiny_bert("classification")


def ranks_of(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    return {name: layer.r[adapter] for name, layer in lora_layers(model, adapter).items()}


def loads_in_plain_peft(model: PeftModel, build: Callable[[], Any], folder: Path) -> None:
    batch = tokens()[0]
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(build(), str(folder))
    assert ranks_of(loaded) == ranks_of(model)
    for name, layer in lora_layers(loaded).items():
        assert layer.scaling["default"] == pytest.approx(
            lora_layers(model)[name].scaling["default"]
        )
    assert torch.allclose(output(loaded, batch), output(model, batch), atol=1e-6)


# -- what may stand beside EVA ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "loraplus"])
def test_rslora_dora_and_loraplus_with_a_head_that_is_trained_in_full(
    tmp_path: Path, options: dict[str, Any], optimizer: str
) -> None:
    model = lora(classifier(), task_type="SEQ_CLS", modules_to_save=["classifier"], **options)
    evatune.initialize(model, tokens(8))
    assert torch.allclose(output(model, tokens()[0]), output(classifier(), tokens()[0]), atol=1e-5)
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad
    assert "classifier" not in ranks_of(model)
    before = head.weight.clone()
    if optimizer == "sgd":
        train_a_little(model, tokens()[0])
    else:
        plus = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
        rates = {id(p): group["lr"] for group in plus.param_groups for p in group["params"]}
        for layer in lora_layers(model).values():  # it holds the parameters that EVA made
            assert rates[id(layer.lora_A["default"].weight)] == 1e-3
            assert rates[id(layer.lora_B["default"].weight)] == 1e-3 * 16
        for _ in range(2):
            plus.zero_grad()
            model(**tokens()[0]).logits.square().sum().backward()
            plus.step()
        assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())
    assert not torch.equal(head.weight, before)
    loads_in_plain_peft(model, classifier, tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"exclude_modules": ["query", "pooler.dense"]},
            lambda name: "query" not in name and "pooler" not in name,
        ),
        ({"exclude_modules": r".*\.0\..*"}, lambda name: ".0." not in name),
        (
            {
                "target_modules": ["query", "dense"],
                "layers_to_transform": [1],
                "layers_pattern": "layer",
            },
            lambda name: ".1." in name and name.endswith(("query", "dense")),
        ),
        (
            {"target_modules": ["query", "value"], "layers_to_transform": 0},
            lambda name: ".0." in name and name[-1] in "ye",
        ),
    ],
    ids=["exclude", "exclude-regex", "layers_to_transform", "one-layer"],
)
def test_layers_that_the_config_leaves_out_stay_out(
    tmp_path: Path, options: dict[str, Any], expected: Callable[[str], bool]
) -> None:
    model = lora(tiny_bert(), **options)
    adapted = set(lora_layers(model))
    assert adapted
    assert all(map(expected, adapted))
    calibration = evatune.initialize(model, tokens(8))
    assert set(calibration.spectra) == adapted
    assert sum(ranks_of(model).values()) == 4 * len(adapted)
    train_a_little(model, tokens()[0])
    loads_in_plain_peft(model, tiny_bert, tmp_path)


def test_each_of_several_adapters_has_directions_of_its_own_data() -> None:
    model = lora(tiny_bert())
    model.add_adapter(
        "b", LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=["query", "value"])
    )
    first = evatune.initialize(model, tokens(8, seed=0))
    a = {name: layer.lora_A["default"].weight.clone() for name, layer in lora_layers(model).items()}
    second = evatune.initialize(model, tokens(8, seed=1), adapter_name="b", scale="paper")
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, a[name])
    assert ranks_of(model, "b") == {
        name: rank for name, rank in second.allocate().ranks.items() if rank
    }
    assert sum(ranks_of(model, "b").values()) == 2 * 4
    for name, layer in lora_layers(model, "b").items():
        assert torch.equal(
            layer.lora_A["b"].weight, second.spectra[name].directions[: layer.r["b"]]
        )
        assert layer.scaling["b"] == pytest.approx(4 / 2**0.5)
        assert not torch.equal(second.spectra[name].directions, first.spectra[name].directions)


# -- patterns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("budget", ["ranks", "parameters"])
def test_a_rank_pattern_caps_its_layers_and_the_whole_costs_what_it_cost(
    tmp_path: Path, rho: float, budget: str
) -> None:
    model = lora(tiny_bert(), rank_pattern={"query": 2, "layer.1.output.dense": 6, "value": 1})
    before, sizes = (
        ranks_of(model),
        {n: layer.in_features + layer.out_features for n, layer in lora_layers(model).items()},
    )
    calibration = evatune.initialize(model, tokens(8), rho=rho, budget=budget)
    plan, found = calibration.allocate(), dict.fromkeys(before, 0) | ranks_of(model)
    assert found == plan.ranks
    caps = {
        name: rank
        for name, rank in before.items()
        if name.endswith(("query", "value", "layer.1.output.dense"))
    }
    assert len(caps) == 5
    assert all(found[name] <= caps.get(name, 4 * rho) for name in found)
    cost = dict.fromkeys(sizes, 1) if budget == "ranks" else sizes
    assert plan.spent == sum(found[name] * cost[name] for name in found) <= plan.limit
    assert plan.limit == sum(before[name] * cost[name] for name in before)
    assert plan.limit - plan.spent < max(cost.values())
    if rho == 1:
        assert found == before
    else:
        assert found != before
    loads_in_plain_peft(model, tiny_bert, tmp_path)


def test_a_rank_in_the_pattern_may_lie_above_rho_times_r() -> None:
    model = lora(tiny_bert(), r=2, rank_pattern={"layer.1.output.dense": 9})
    calibration = evatune.initialize(model, tokens(8), rho=1)
    assert ranks_of(model)["encoder.layer.1.output.dense"] == 9
    assert calibration.config.components == 9


def test_scales_of_both_patterns_are_kept(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"value": 24, "layer.0.attention.self.query": 6},
    }
    model = lora(tiny_bert(), **patterns)
    before = {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}
    assert sorted(set(before.values())) == [2, 3, 4, 6]
    calibration = evatune.initialize(model, tokens(8), rho=1.5)
    assert ranks_of(model) != calibration.allocate(rho=1).ranks
    for name, layer in lora_layers(model).items():
        assert layer.scaling["default"] == pytest.approx(before[name])
    train_a_little(model, tokens()[0])
    loads_in_plain_peft(model, tiny_bert, tmp_path)


def test_caps_are_part_of_the_record(tmp_path: Path) -> None:
    model = lora(tiny_bert(), rank_pattern={"query": 2})
    calibration = evatune.initialize(model, tokens(8))
    calibration.save(tmp_path / "c.safetensors")
    loaded = evatune.Calibration.load(tmp_path / "c.safetensors")
    assert {layer.cap for name, layer in loaded.layers.items() if "query" in name} == {2}
    assert loaded.allocate() == calibration.allocate()


def test_a_rank_of_the_callers_replaces_the_pattern() -> None:
    model = lora(tiny_bert(), rank_pattern={"query": 2})
    calibration = evatune.initialize(model, tokens(8), rank=3, rho=1)
    assert set(ranks_of(model).values()) == {3}
    assert {layer.cap for layer in calibration.layers.values()} == {None}


def test_the_stop_rule_knows_the_caps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    model = get_peft_model(net, LoraConfig(r=8, target_modules=["0", "2"], rank_pattern={"2": 2}))
    assert evatune.initialize(model, inputs(64, rows=256), rho=1.0).batches < 64


# -- a finished calibration ------------------------------------------------------------------------


def test_a_calibration_from_a_file_gives_what_its_batches_give(tmp_path: Path) -> None:
    direct, loaded = (
        lora(tiny_bert(), rank_pattern={"query": 2}),
        lora(tiny_bert(), rank_pattern={"query": 2}),
    )
    evatune.initialize(direct, tokens(8)).save(tmp_path / "c.safetensors")
    used = evatune.initialize(loaded, evatune.Calibration.load(tmp_path / "c.safetensors"))
    assert used.allocate().ranks == dict.fromkeys(used.layers, 0) | ranks_of(loaded)
    assert str(loaded.peft_config) == str(direct.peft_config)
    ours, theirs = loaded.state_dict(), direct.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merged_shards_start_an_adapter_on_a_part_of_the_layers() -> None:
    config = evatune.CalibrationConfig(rank=4)
    shards = [evatune.calibrate(tiny_bert(), tokens(6, seed=seed), config) for seed in (0, 1)]
    merged = evatune.Calibration.merge(shards)
    model = lora(tiny_bert(), target_modules=["query", "intermediate.dense"])
    used = evatune.initialize(model, merged, scale="matched", budget="parameters")
    assert set(used.spectra) == {
        n for n in merged.spectra if n.endswith(("query", "intermediate.dense"))
    }
    plan = used.allocate()
    assert (plan.rank, plan.rho, plan.budget) == (4, 2.0, "parameters")
    assert dict.fromkeys(used.layers, 0) | ranks_of(model) == plan.ranks
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight
        v = merged.spectra[name].directions[: len(a)]
        assert torch.allclose(a / a.norm(dim=1, keepdim=True), v, atol=1e-6)


# -- starting over ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "orthogonal"}],
    ids=str,
)
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_overwrite_starts_a_trained_adapter_over(options: dict[str, Any], rho: float) -> None:
    fresh = lora(tiny_bert(), **{k: v for k, v in options.items() if k != "init_lora_weights"})
    model = lora(tiny_bert(), **options)
    train_a_little(model, tokens()[0])
    assert not torch.allclose(
        output(model, tokens()[0]), output(tiny_bert(), tokens()[0]), atol=1e-4
    )
    for each in (fresh, model):
        evatune.initialize(each, tokens(8), rho=rho, overwrite=each is model)
    assert torch.allclose(output(model, tokens()[0]), output(tiny_bert(), tokens()[0]), atol=1e-5)
    ours, theirs = model.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
