"""The layers that targets name, and what is said of those that match nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import evatune
from evatune.capture import find_target_layers
from evatune.errors import TargetError
from tests.helpers import EXACT, Toy, tiny_bert, tiny_llama, tokens
from tests.layer_models import Attends

torch.set_num_threads(1)


def names(model: nn.Module, targets: Any) -> list[str]:
    return [target_layer.name for target_layer in find_target_layers(model, targets)]


# torch.compile imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_linear_leaves_out_the_output_embedding_as_peft_does() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    for build in (tiny_llama, tiny_bert):
        adapted = get_peft_model(build(), LoraConfig(target_modules="all-linear"))
        theirs = [
            n.removeprefix("base_model.model.")
            for n, m in adapted.named_modules()
            if isinstance(m, LoraLayer)
        ]
        assert names(build(), "all-linear") == theirs


def test_targets_are_suffixes_names_or_a_regular_expression() -> None:
    toy = Toy()
    assert names(toy, ["q"]) == ["blocks.0.q", "blocks.1.q"]
    assert names(toy, ["blocks.1.q", "down"]) == ["blocks.0.down", "blocks.1.q", "blocks.1.down"]
    assert names(toy, r".*\.0\.(q|v)") == ["blocks.0.q", "blocks.0.v"]
    assert len(names(toy, None)) == 10


def test_a_target_that_matches_nothing_says_what_would() -> None:
    with pytest.raises(
        TargetError, match=r"\['query'\] match no layer.*end in: down, k, q, up, v.*all-linear"
    ):
        find_target_layers(Toy(), ["query"])
    with pytest.raises(TargetError, match="not a regular expression"):
        find_target_layers(Toy(), "(")
    with pytest.raises(TargetError, match="no linear layer at all"):
        find_target_layers(nn.Sequential(nn.ReLU()), "all-linear")


def test_a_target_of_an_unsupported_kind_is_named() -> None:
    with pytest.raises(TargetError, match=r"conv \(ConvTranspose1d\).*exclude_modules"):
        find_target_layers(nn.ModuleDict({"conv": nn.ConvTranspose1d(2, 2, 1)}), ["conv"])


def test_gpt2_conv1d_is_a_linear_layer_with_its_weight_transposed() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    target_layers = {
        target_layer.name: target_layer for target_layer in find_target_layers(model, "all-linear")
    }
    assert (
        target_layers["transformer.h.0.attn.c_attn"].in_features,
        target_layers["transformer.h.0.attn.c_attn"].out_features,
    ) == (16, 48)
    calibration = evatune.calibrate(model, tokens(), EXACT)
    assert calibration.spectra["transformer.h.0.mlp.c_proj"].directions.shape == (8, 64)


def test_all_linear_leaves_out_the_output_embedding_be_it_compiled_or_trained() -> None:
    compiled, trained = tiny_llama(), tiny_llama()
    compiled.lm_head = torch.compile(compiled.lm_head, backend="eager")
    trained = get_peft_model(
        trained, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    plain = {target_layer.name for target_layer in find_target_layers(tiny_llama(), "all-linear")}
    for model in (compiled, trained):
        assert {
            target_layer.name for target_layer in find_target_layers(model, "all-linear")
        } == plain


# torch.compile imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_a_compiled_model_are_those_of_the_model() -> None:
    assert names(torch.compile(Toy()), None) == names(Toy(), None)


def test_a_module_that_is_trained_in_full_keeps_its_name_and_its_original_is_watched() -> None:
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_bert("classification"), LoraConfig(r=2, **options))
    assert names(model, "all-linear") == names(tiny_bert("classification"), "all-linear")
    assert names(model, None) == [
        name for name in names(model, "all-linear") if name.endswith("query")
    ]
    calibration = evatune.calibrate(model, tokens(8), EXACT, targets=["classifier"])
    assert calibration.status["classifier"].usable


def test_a_regular_expression_takes_no_weight_of_a_convolution_for_experts() -> None:
    target_layers = find_target_layers(nn.ModuleDict({"conv": nn.Conv1d(2, 3, 1)}), r"conv.*")
    assert [target_layer.name for target_layer in target_layers] == ["conv"]


def test_kinds_that_are_not_supported_are_named_with_those_that_are() -> None:
    model = nn.ModuleDict(
        {"a": nn.Bilinear(2, 2, 2), "b": nn.ConvTranspose2d(2, 2, 1), "c": nn.Linear(2, 2)}
    )
    with pytest.raises(
        TargetError, match=r"a \(Bilinear\), b \(ConvTranspose2d\); supported are .*nn\.Embedding"
    ):
        find_target_layers(model, ["a", "b", "c"])
    split = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4)})
    with pytest.raises(
        TargetError, match=r"attn \(MultiheadAttention\).*query, key and value of one width"
    ):
        find_target_layers(split, ["attn"])


def test_attention_named_together_with_its_output_projection_is_one_layer() -> None:
    names = {"attn", "attn.out_proj"}
    assert {
        target_layer.name for target_layer in find_target_layers(Attends(), ["attn", "out_proj"])
    } == names
    assert [
        target_layer.name for target_layer in find_target_layers(Attends(), ["attn", "out_proj"])
    ].count("attn.out_proj") == 1
