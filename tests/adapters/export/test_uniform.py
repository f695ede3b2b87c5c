"""Adapters for servers: each runtime's own rule for the scale, computed, against plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import evatune
from evatune.adapters.export import export_uniform
from evatune.adapters.export.uniform import Uniform
from evatune.errors import AdapterError
from tests.helpers import (
    lora_layers,
    output,
    perturbed_adapter,
    skewed,
    tiny_bert,
    tiny_llama,
    tokens,
    train_a_little,
    trained_adapter,
)

torch.set_num_threads(1)

PREFIX = "base_model.model."


def spread(model: PeftModel) -> PeftModel:
    """Scales of their own for some layers."""
    for index, (name, layer) in enumerate(lora_layers(model).items()):
        if index % 3 == 0:
            model.peft_config["default"].alpha_pattern[name] = 1 + index
            layer.lora_alpha["default"] = 1 + index
            layer.set_scale("default", 1)
    return model


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors"
    )


def pairs(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    ends = ".lora_A.weight", ".lora_B.weight"
    names = {
        key.removeprefix(PREFIX).removesuffix(ends[0]) for key in state if key.endswith(ends[0])
    }
    return {
        name: (state[PREFIX + name + ends[0]], state[PREFIX + name + ends[1]]) for name in names
    }


def vllm(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """α/r of the config (α/√r for rsLoRA) for every layer, no patterns; buffers of `max_lora_rank`
    rows."""
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    assert all(len(a) <= config["r"] for a, _ in pairs(state).values())
    return {name: scale * b @ a for name, (a, b) in pairs(state).items()}


def sglang(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Patterns refused; endings of the targets; q, k and v, and gate and up, stacked into one
    matrix each."""
    for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        assert all(value == config[default] for value in (config.get(key) or {}).values())
    assert isinstance(config["target_modules"], list)
    endings = {name.rpartition(".")[2] for name in config["target_modules"]}
    found = pairs(state)
    assert {name.rpartition(".")[2] for name in found} <= endings
    for name in found:
        parent, _, child = name.rpartition(".")
        for stack in ({"q_proj", "k_proj", "v_proj"} & endings, {"gate_proj", "up_proj"} & endings):
            if child in stack:
                assert (
                    len(torch.cat([found[f"{parent}.{part}"][0] for part in stack]))
                    == len(stack) * config["r"]
                )
    return {name: config["lora_alpha"] / config["r"] * b @ a for name, (a, b) in found.items()}


def llama_cpp(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One α in the file's header; α over the rank of the layer's own matrices. No tensors but A and
    B."""
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    return {
        name: config["lora_alpha"] / b.shape[1] * b @ a for name, (a, b) in pairs(state).items()
    }


def axolotl(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its merge refuses patterns where they are named at all, and every start but PEFT's plain
    ones."""
    assert not config["use_dora"]
    assert "rank_pattern" not in config
    assert "alpha_pattern" not in config
    assert config["init_lora_weights"] in ("gaussian", "loftq", True, False)
    scale = float(config["lora_alpha"]) / float(config["r"])
    return {
        name: (scale * b @ a).T if config["fan_in_fan_out"] else scale * b @ a
        for name, (a, b) in pairs(state).items()
    }


RUNTIMES = [vllm, sglang, llama_cpp, axolotl]


@torch.no_grad()
def with_updates(model: Any, updates: dict[str, Tensor]) -> Any:
    for name, update in updates.items():
        weight = model.get_submodule(name).weight
        weight += update if update.shape == weight.shape else update.T
    return model


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda r: r.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"spread": True},
        {"spread": True, "use_rslora": False, "rho": 4.0, "raw": True},
    ],
    ids=["lora", "rslora", "scales", "rank-zero"],
)
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_every_runtime_computes_what_peft_computes(
    tmp_path: Path, build: Any, options: dict[str, Any], runtime: Any
) -> None:
    settings = {key: value for key, value in options.items() if key != "spread"}
    start = (lambda: skewed(tiny_bert())) if build is tiny_bert and options.get("raw") else build
    model = trained_adapter(start(), **settings)
    model = spread(model) if options.get("spread") else model
    assert len({layer.r["default"] for layer in lora_layers(model).values()}) > 1
    batch = tokens()[0]
    expected = output(model, batch)
    export_uniform(model, tmp_path / "out")
    found = output(with_updates(start(), runtime(*saved(tmp_path / "out"))), batch)
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((output(start(), batch) - expected).abs().max()) > 1e-3


def test_the_adapter_as_peft_saves_it_is_wrong_or_refused_there(tmp_path: Path) -> None:
    """So that the rules above are rules: what they say to the adapter before its export."""
    model = spread(trained_adapter(tiny_llama()))
    model.save_pretrained(tmp_path)
    config, state = saved(tmp_path)
    expected = output(model, tokens()[0])
    for refuses in (sglang, axolotl):
        with pytest.raises(AssertionError):
            refuses(config, state)
    found = output(with_updates(tiny_llama(), llama_cpp(config, state)), tokens()[0])
    assert float((found - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("source", ["folder", "model"])
def test_plain_peft_loads_it_without_a_warning_and_a_second_export_changes_nothing(
    tmp_path: Path, source: str
) -> None:
    model = spread(trained_adapter(tiny_bert(), use_rslora=True))
    model.save_pretrained(tmp_path / "adapter")
    done = export_uniform(model if source == "model" else tmp_path / "adapter", tmp_path / "out")
    assert done.rank == max(layer.r["default"] for layer in lora_layers(model).values())
    assert done.layers == len(lora_layers(model))
    assert done.rescaled
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "out"))
    assert {layer.r["default"] for layer in lora_layers(loaded).values()} == {done.rank}
    assert {layer.scaling["default"] for layer in lora_layers(loaded).values()} == {
        done.alpha / done.rank
    }
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)
    again = export_uniform(tmp_path / "out", tmp_path / "again")
    assert again == Uniform(done.rank, done.alpha, done.layers + len(done.zeros), (), ())
    assert all(
        torch.equal(v, saved(tmp_path / "again")[1][k])
        for k, v in saved(tmp_path / "out")[1].items()
    )


def test_one_scale_everywhere_leaves_every_number_as_it_is(tmp_path: Path) -> None:
    model = trained_adapter(tiny_bert().to(torch.bfloat16))
    model.save_pretrained(tmp_path / "adapter")
    done = export_uniform(tmp_path / "adapter", tmp_path / "out")
    assert done.rescaled == ()
    assert done.alpha == 3 * done.rank / 4
    before, after = saved(tmp_path / "adapter")[1], saved(tmp_path / "out")[1]
    for key, value in before.items():
        kept = after[key][: len(value)] if "lora_A" in key else after[key][:, : value.shape[1]]
        assert torch.equal(kept, value)
        assert kept.dtype == value.dtype
        assert float(after[key].abs().sum()) == pytest.approx(float(value.abs().sum()))


def test_a_layer_of_rank_zero_gets_zeros_where_its_neighbors_have_an_adapter(
    tmp_path: Path,
) -> None:
    model = trained_adapter(tiny_llama(), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    gone = "model.layers.1.self_attn.q_proj"
    save_file({key: value for key, value in state.items() if gone not in key}, weights)
    done = export_uniform(tmp_path / "adapter", tmp_path / "out")
    assert done.zeros == (gone,)
    config, state = saved(tmp_path / "out")
    assert gone in config["target_modules"]
    assert not any(state[f"{PREFIX}{gone}.lora_{part}.weight"].any() for part in "AB")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    found = output(with_updates(tiny_llama(), sglang(config, state)), tokens()[0])
    assert torch.allclose(output(loaded, tokens()[0]), found, atol=1e-5)


def test_a_layer_that_a_block_does_not_have_gets_no_zeros(tmp_path: Path) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = (("q", "k"), ("q",))
            blocks = [nn.ModuleDict({name: nn.Linear(8, 8) for name in each}) for each in names]
            self.layers = nn.ModuleList(blocks)

    model = get_peft_model(Blocks(), LoraConfig(r=2, target_modules=["q", "k"]))
    uniform = export_uniform(model, tmp_path / "out")
    assert (uniform.layers, uniform.zeros) == (3, ())


def test_a_head_that_was_trained_beside_the_adapter_is_kept(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_bert("classification", num_labels=5),
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"),
    )
    evatune.initialize(model, tokens(8))
    train_a_little(model, tokens()[0])
    export_uniform(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(
        tiny_bert("classification", num_labels=5), str(tmp_path / "out")
    )
    assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-6)


def test_conv1d_and_embeddings(tmp_path: Path) -> None:
    def gpt2() -> Any:
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ).eval()

    settings: dict[str, Any] = {"r": 4, "rank_pattern": {"c_fc": 6}, "fan_in_fan_out": True}
    for build, options in (
        (gpt2, settings | {"target_modules": ["c_attn", "c_fc"]}),
        (
            tiny_llama,
            {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"q_proj": 2}},
        ),
    ):
        model = get_peft_model(build(), LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        folder = tmp_path / build.__name__
        export_uniform(model, folder)
        loaded = PeftModel.from_pretrained(build(), str(folder))
        assert torch.allclose(output(loaded, tokens()[0]), output(model, tokens()[0]), atol=1e-5)


def test_another_adapter_of_the_model_by_name(tmp_path: Path) -> None:
    model = trained_adapter(tiny_bert())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    assert export_uniform(model, tmp_path / "out", adapter_name="other").rank == 2
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        export_uniform(model, tmp_path / "x", adapter_name="x")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dora": True}, "use_dora is set.*--format merged"),
        ({"lora_bias": True}, "lora_bias is set.*--format merged"),
        (
            {"init_lora_weights": "pissa"},
            "'pissa', which changes the base weights.*path_initial_model",
        ),
    ],
)
def test_what_one_rank_cannot_say_is_refused(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"], **options))
    with pytest.raises(AdapterError, match=text):
        export_uniform(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_several_adapters_in_plain_peft_do_what_the_documentation_says(tmp_path: Path) -> None:
    def build() -> Any:
        return skewed(tiny_bert())

    batch = tokens()[0]
    with_zeros, other = (
        trained_adapter(build(), raw=True, rho=4.0),
        perturbed_adapter(build(), target_modules="all-linear"),
    )
    assert len(lora_layers(with_zeros)) < len(lora_layers(other))
    expected, sums = {}, build()
    for name, model in (("first", with_zeros), ("other", other)):
        expected[name] = output(model, batch)
        model.save_pretrained(tmp_path / name)
        export_uniform(tmp_path / name, tmp_path / f"{name}-uniform")
        sums = with_updates(sums, vllm(*saved(tmp_path / f"{name}-uniform")))
    for names in (("first", "other"), ("other", "first")):
        model = PeftModel.from_pretrained(build(), str(tmp_path / names[0]), adapter_name=names[0])
        model.load_adapter(str(tmp_path / names[1]), adapter_name=names[1])
        for name in names:
            model.set_adapter(name)
            assert torch.allclose(output(model, batch), expected[name], atol=1e-6)
    with pytest.raises(ValueError, match="must have the same r value"):
        model.add_weighted_adapter(list(names), [1.0, 1.0], "sum", combination_type="linear")
    model.add_weighted_adapter(list(names), [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert torch.allclose(output(model, batch), output(sums, batch), atol=1e-4)

    model = PeftModel.from_pretrained(build(), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(model, str(tmp_path / "first"), "default")
    model = PeftModel.from_pretrained(build(), str(tmp_path / "other-uniform"))
    hotswap_adapter(model, str(tmp_path / "first-uniform"), "default")
    assert torch.allclose(output(model, batch), expected["first"], atol=1e-5)
    model = PeftModel.from_pretrained(build(), str(tmp_path / "first-uniform"))
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        hotswap_adapter(model, str(tmp_path / "other-uniform"), "default")
