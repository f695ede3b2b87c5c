"""Adapters for servers: each runtime's own rule for the scale, computed, against plain PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import evatune
from evatune.adapters.export import RECORD, Uniform, export_uniform, merge, write_merged
from evatune.errors import AdapterError, ConfigError, RecordError
from evatune.utils.mark import MARK
from tests.conftest import Command, refused
from tests.helpers import lora_layers, output, skewed, tiny_bert, tiny_llama, tokens, train_a_little

torch.set_num_threads(1)

PREFIX = "base_model.model."


def trained(model: nn.Module, **options: Any) -> PeftModel:
    """An EVA adapter with ranks that differ, and B ≠ 0."""
    init: dict[str, Any] = {"rho": options.pop("rho", 2.0)} | (
        {"metric": "raw"} if options.pop("raw", False) else {}
    )
    settings = {"r": 4, "lora_alpha": 3, "target_modules": "all-linear"} | options
    adapted = get_peft_model(model, LoraConfig(**settings))
    evatune.initialize(adapted, tokens(8), **init)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(adapted).values():
            b = layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape, generator=generator) / 5)
    return adapted


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


# -- what each runtime makes of a folder: layer → the update of its weight -------------------------


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
    model = trained(start(), **settings)
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
    model = spread(trained(tiny_llama()))
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
    model = spread(trained(tiny_bert(), use_rslora=True))
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
    model = trained(tiny_bert().to(torch.bfloat16))
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


def test_a_layer_of_rank_zero_gets_zeros_where_its_neighbours_have_an_adapter(
    tmp_path: Path,
) -> None:
    model = trained(tiny_llama(), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
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
    model = trained(tiny_bert())
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
        trained(build(), raw=True, rho=4.0),
        perturbed(build(), target_modules="all-linear"),
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


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def adapter(bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trained adapter of the tiny BERT on disk."""
    monkeypatch.chdir(tmp_path)
    base = transformers.AutoModel.from_pretrained(bert_folder)
    model = trained(base, task_type="FEATURE_EXTRACTION")
    model.save_pretrained(tmp_path / "adapter")
    return Path("adapter")


def bert_with(adapter: Path, bert_folder: Path) -> Tensor:
    return output(
        PeftModel.from_pretrained(
            transformers.AutoModel.from_pretrained(bert_folder), str(adapter)
        ),
        tokens()[0],
    )


def test_export_uniform_is_the_default(command: Command, adapter: Path, bert_folder: Path) -> None:
    answer = command("export", adapter, "-o", "out")
    assert answer.status == 0, answer.err
    rank = json.loads(Path("out/adapter_config.json").read_text())["r"]
    assert f"rank {rank}, alpha {3 * rank / 4:g}, 13 layers" in answer.out
    assert {path.name for path in Path("out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        RECORD,
        MARK,
    }
    assert torch.allclose(
        bert_with(Path("out"), bert_folder), bert_with(adapter, bert_folder), atol=1e-6
    )
    assert f"base_model: {bert_folder}" in Path("out/README.md").read_text()
    facts = json.loads(command("export", adapter, "--out", "again", "--json").out)
    assert (facts["out"], facts["format"], facts["rank"]) == ("again", "uniform", rank)


def test_export_merged_needs_no_peft_afterwards(
    command: Command, adapter: Path, bert_folder: Path
) -> None:
    answer = command("export", adapter, "-o", "out", "--format", "merged")
    assert answer.status == 0, answer.err
    merged = transformers.AutoModel.from_pretrained("out")
    assert torch.allclose(output(merged, tokens()[0]), bert_with(adapter, bert_folder), atol=1e-5)
    assert len(transformers.AutoTokenizer.from_pretrained("out")) == 60
    assert "merged into its weights" in Path("out/README.md").read_text()
    files = json.loads(Path("out", MARK).read_text())["files"]
    assert {*files, MARK} == {path.name for path in Path("out").iterdir()}


def tied_llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            tie_word_embeddings=True,
        )
    ).eval()


def tied_bart() -> Any:
    torch.manual_seed(0)
    sizes = {
        f"{part}_{key}": n
        for part in ("encoder", "decoder")
        for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = transformers.BartConfig(vocab_size=60, d_model=16, max_position_embeddings=40, **sizes)
    return transformers.BartForConditionalGeneration(config).eval()


def tied_t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tied_bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(tiny_bert().config).eval()


def perturbed(base: nn.Module, **options: Any) -> PeftModel:
    """The model with an adapter of which every trained weight is random."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    (torch.randn(parameter.shape, generator=generator) / 4).to(parameter.dtype)
                )
    return model


def probe(model: Any) -> dict[str, Tensor]:
    ids = tokens(1)[0]["input_ids"]
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    )


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word",
    "ignore:Model with `tie_word",
    "ignore:Setting `save_embedding_layers`",
)
@pytest.mark.parametrize(
    ("build", "options", "tied"),
    [
        (tied_llama, {"target_modules": ["q_proj"]}, True),
        (tied_llama, {"target_modules": ["q_proj", "embed_tokens"]}, False),
        (tied_llama, {"target_modules": ["lm_head"]}, False),
        (tied_llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        (tied_llama, {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 3)]}, True),
        (tied_bart, {"target_modules": ["decoder.embed_tokens"]}, False),
        (tied_bart, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        # a T5 says that it is tied, and goes by its weights
        (tied_t5, {"target_modules": ["lm_head"]}, None),
        (tied_bert, {"target_modules": ["word_embeddings"]}, False),
        (lambda: tied_llama().to(torch.bfloat16), {"target_modules": ["embed_tokens"]}, False),
    ],
)
def test_weights_that_layers_share_come_apart_where_the_adapter_belongs_to_one(
    tmp_path: Path, build: Any, options: dict[str, Any], tied: bool | None
) -> None:
    model = perturbed(build(), **options)
    batch = probe(model)
    expected = output(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert write_merged(build(), tmp_path / "adapter", tmp_path / "merged", batch) is None
    again = type(build()).from_pretrained(tmp_path / "merged", dtype="auto")
    tolerance = 1e-6 if again.dtype == torch.float32 else 1e-2
    assert float((output(again, batch) - expected).norm() / expected.norm()) < tolerance
    assert float((output(build(), batch) - expected).norm() / expected.norm()) > 5e-3
    assert tied in (None, again.config.tie_word_embeddings)


def test_one_layer_under_two_names_is_merged_under_the_adapters_name_only(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        model.append(model[0])
        return model

    model = perturbed(build(), target_modules=["0"])
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert torch.allclose(merge(build(), tmp_path)(x), model(x), atol=1e-6)


def test_a_merged_model_that_computes_something_else_is_not_written(
    command: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LoraModel.merge_and_unload

    def wrong(model: LoraModel, **options: Any) -> nn.Module:
        merged: nn.Module = plain(model, **options)
        with torch.no_grad():
            merged.get_submodule("encoder.layer.1.output.dense").weight.mul_(0.9)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    answer = command("export", adapter, "-o", "out", "--format", "merged")
    refused(answer, "is off by", "nothing was written", folder=Path(), left=frozenset({"adapter"}))


def test_a_model_that_does_not_run_on_tokens_is_written_and_said_to_be_unchecked(
    tmp_path: Path,
) -> None:
    model = perturbed(tied_bart(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    why = write_merged(
        tied_bart(), tmp_path / "adapter", tmp_path / "merged", {"pixel_values": torch.ones(1, 3)}
    )
    assert "does not run on tokens alone" in str(why)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_quantized_base_is_not_merged_into(tmp_path: Path) -> None:
    perturbed(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    base = tiny_llama()
    base.is_quantized = True
    with pytest.raises(AdapterError, match=r"quantized.*--model"):
        merge(base, tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tokens_that_were_added_for_the_adapter_are_in_the_merged_model(
    command: Command, llama_folder: Path, tmp_path: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    base.resize_token_embeddings(64, mean_resizing=False)
    model = perturbed(base, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_tokens(["n1", "n2", "n3", "n4"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    answer = command("export", tmp_path / "adapter", "-o", tmp_path / "out", "--format", "merged")
    assert answer.status == 0, answer.err
    batch = {"input_ids": torch.arange(64)[None, 40:]}
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(output(merged, batch), output(model, batch), atol=1e-6)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 64


def test_export_merged_of_a_classifier_brings_its_head(
    command: Command,
    bert_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        bert_folder, num_labels=5
    )
    model = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=4, use_dora=True, target_modules=["query", "value"])
    )
    train_a_little(model, tokens()[0])
    model.save_pretrained("adapter")
    answer = command("export", "adapter", "-o", "out", "--format", "merged")
    assert answer.status == 0, answer.err
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("out")
    assert torch.allclose(output(merged, tokens()[0]), output(model, tokens()[0]), atol=1e-5)


def break_folder(folder: Path, how: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    facts, state = json.loads(config.read_text()), load_file(weights)
    if how == "torn":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "without B":
        save_file({key: value for key, value in state.items() if "lora_B" not in key}, weights)
    elif how == "shapes":
        save_file(
            {
                key: value[:, :1].contiguous() if "lora_B" in key else value
                for key, value in state.items()
            },
            weights,
        )
    elif how == "magnitudes":
        save_file(state | {f"{PREFIX}a.lora_magnitude_vector": torch.ones(3)}, weights)
    else:
        config.write_text(json.dumps(facts | json.loads(how)))


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("torn", ["adapter_model.safetensors' is damaged"]),
        ("no weights", ["holds no adapter_model.safetensors"]),
        ("no config", ["adapter_config.json' does not exist"]),
        ("without B", ["lacks A or B"]),
        ("shapes", ["do not fit each other"]),
        ("magnitudes", ["lora_magnitude_vector", "--format merged"]),
        ('{"peft_type": "IA3"}', ["type 'IA3'", "only LoRA"]),
        ('{"use_dora": true}', ["use_dora", "--format merged"]),
    ],
)
def test_a_damaged_or_other_adapter_is_refused(
    command: Command, adapter: Path, how: str, parts: list[str]
) -> None:
    break_folder(adapter, how)
    refused(
        command("export", adapter, "-o", "out"), *parts, folder=Path(), left=frozenset({"adapter"})
    )


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("torn", ["adapter_model.safetensors' is damaged"]),
        ("no config", ["adapter_config.json' does not exist"]),
        ('{"peft_type": "IA3"}', ["type 'IA3'"]),
        ('{"base_model_name_or_path": null}', ["does not say what its base model is", "--model"]),
        (
            '{"base_model_name_or_path": "/no/such/model"}',
            ["'/no/such/model' does not exist", "--model"],
        ),
        ('{"r": 5, "rank_pattern": {}}', ["cannot be merged into BertModel", "size mismatch"]),
    ],
)
def test_what_cannot_be_merged_is_refused(
    command: Command, adapter: Path, how: str, parts: list[str]
) -> None:
    break_folder(adapter, how)
    answer = command("export", adapter, "-o", "out", "--format", "merged")
    refused(answer, *parts, folder=Path(), left=frozenset({"adapter"}))


def test_an_adapter_of_another_model_is_not_merged(
    command: Command, adapter: Path, llama_folder: Path
) -> None:
    answer = command("export", adapter, "-o", "out", "--format", "merged", "--model", llama_folder)
    refused(answer, "cannot be merged into", folder=Path(), left=frozenset({"adapter"}))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--format", "gguf"], ["'gguf'", "uniform, merged"]),
        (["-o", "adapter", "--overwrite"], ["the adapter itself"]),
        (["-o", "there"], ["exists", "--overwrite"]),
        (["-o", "there", "--overwrite"], ["not written by evatune", "--out"]),
    ],
)
def test_bad_options_of_export_are_refused(
    command: Command, adapter: Path, arguments: list[str], parts: list[str]
) -> None:
    Path("there").mkdir()
    answer = command(
        "export", adapter, *(["-o", "out"] if "-o" not in arguments else []), *arguments
    )
    refused(answer, *parts, folder=Path(), left=frozenset({"adapter", "there"}))


def test_a_missing_adapter_and_a_missing_out_are_refused(command: Command, tmp_path: Path) -> None:
    refused(command("export", tmp_path / "none", "-o", tmp_path / "out"), "is not a folder")
    refused(command("export", tmp_path / "none"), "--out", "--help")


def test_overwrite_replaces_an_export_and_nothing_else(command: Command, adapter: Path) -> None:
    assert command("export", adapter, "-o", "out", "--format", "merged").status == 0
    refused(command("export", adapter, "-o", "out"), "exists", "--overwrite")
    assert command("export", adapter, "-o", "out", "--overwrite").status == 0
    assert not Path("out/model.safetensors").exists()
    Path("out/thesis.tex").write_text("years")
    refused(command("export", adapter, "-o", "out", "--overwrite"), "thesis.tex")
    assert {path.name for path in Path().iterdir()} == {"adapter", "out"}


def test_a_failure_while_writing_leaves_nothing(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evatune.adapters.export.write_card", fail)
    with pytest.raises(ConfigError, match="No space left"):
        export_uniform(adapter, "out")
    assert {path.name for path in Path().iterdir()} == {"adapter"}


def test_an_adapter_that_is_not_lora_is_refused_as_a_model_too(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="IA3Config"):
        export_uniform(model, tmp_path / "out")
    with pytest.raises(RecordError, match="does not exist"):
        export_uniform(tmp_path / "none", tmp_path / "out")


def test_what_evatune_init_wrote_can_be_exported(
    command: Command, bert_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    first = command(
        "init",
        "--model",
        bert_folder,
        "--data",
        text_file,
        "--rank",
        4,
        "--out",
        tmp_path / "adapter",
    )
    assert first.status == 0, first.err
    for kind in ("uniform", "merged"):
        answer = command("export", tmp_path / "adapter", "-o", tmp_path / kind, "--format", kind)
        assert answer.status == 0, answer.err
    shutil.rmtree(tmp_path / "adapter")
    assert torch.allclose(
        bert_with(tmp_path / "uniform", bert_folder),
        output(transformers.AutoModel.from_pretrained(tmp_path / "merged"), tokens()[0]),
        atol=1e-5,
    )
