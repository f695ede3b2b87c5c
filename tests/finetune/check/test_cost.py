"""Parameters, memory and time by formulas that a hand can follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evatune.errors import ConfigError, TargetError
from evatune.finetune.check import cost
from evatune.finetune.check.cost import (
    Lengths,
    lengths_of,
    measured_rate,
    memory_of,
    size_of,
    time_of,
)
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.tasks.understanding import domain as understanding

CONFIG = transformers.LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
# query, key, value, output; gate, up, down; of each layer. And the output of the vocabulary.
WEIGHTS = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64) + 32 * 60
WIDTHS = 2 * (64 + 48 + 48 + 64 + 3 * 96) + 92


def recipe(*more: str) -> Recipe:
    settings = ["adapter.rank=2", "adapter.rho=1", "training.batch_size=3", "training.steps=10"]
    return load("generation-clock", [*settings, *more])


def test_sizes_are_those_of_the_model_with_its_adapter() -> None:
    size = size_of(recipe("method=lora"), CONFIG)
    model = transformers.LlamaForCausalLM(CONFIG)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (size.products, size.widths, size.widest) == (WEIGHTS, WIDTHS, 96)
    assert size.trained == 2 * (WIDTHS - 92)  # rank times in and out, but for the head's
    assert (size.vocabulary, size.calibrated) == (60, ())
    assert len(size_of(recipe(), CONFIG).calibrated) == 14


def test_a_new_head_is_trained_with_as_many_classes(bert_folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(bert_folder)
    settings = load("understanding-bbc", ["method=head", f"model={bert_folder}"])
    assert size_of(settings, config, 5).trained == 5 * 33


@pytest.mark.parametrize("method", ["pissa", "lora-ga", "corda", "full", "dora", "adalora"])
def test_methods_that_want_weights_have_a_size_too(method: str) -> None:
    assert size_of(recipe(f"method={method}"), CONFIG).trained > 0


@pytest.mark.parametrize("method", ["lora-fa", "eva-fa", "mica"])
def test_a_matrix_that_stays_as_it_starts_is_not_trained(method: str) -> None:
    half = size_of(recipe("method=lora"), CONFIG).trained / 2
    assert 0.5 * half < size_of(recipe(f"method={method}"), CONFIG).trained < 1.5 * half


def test_what_a_method_cannot_run_on_is_refused() -> None:
    with pytest.raises(TargetError, match="match no layer of this model"):
        size_of(recipe("adapter.targets=nothing"), CONFIG)
    with pytest.raises(ConfigError, match="needs layers at least"):
        size_of(recipe("method=milora", "adapter.rank=40"), CONFIG)


def test_memory_is_the_sum_of_its_parts() -> None:
    size = size_of(recipe(), CONFIG)
    memory = memory_of(recipe(), size, Lengths(7, 10))
    assert memory.weights == 4 * size.parameters
    assert memory.training == 16 * size.trained
    assert memory.activations == 30 * (4 * WIDTHS + 8 * 60)
    assert memory.evaluation == 120 * (96 * 4 + 60 * 12)
    sketches = 12 * sum(width * min(width, 31) for width in size.calibrated)
    assert memory.calibration == sketches + 30 * 96 * 4
    assert memory.peak == memory.weights + max(
        memory.training + max(memory.activations, memory.evaluation), memory.calibration
    )
    assert memory.device > 2**28


def test_sketches_have_a_column_for_every_rank_that_a_layer_may_get() -> None:
    settings = recipe("adapter.rank=25", "adapter.rho=1.16")  # 29, or 28.999999999999996
    size = replace(size_of(recipe(), CONFIG), calibrated=(100,), widest=0)
    columns = 29 + 16 - 1
    assert memory_of(settings, size, Lengths(7, 10)).calibration == 12 * 100 * columns


def test_all_weights_need_no_second_copy_and_bfloat16_is_half() -> None:
    full = recipe("method=full")
    size = size_of(full, CONFIG)
    assert memory_of(full, size, Lengths(7, 10)).training == 12 * size.parameters
    half = memory_of(recipe("training.precision=bf16"), size, Lengths(7, 10))
    assert half.weights == 2 * size.parameters


@pytest.mark.parametrize(("method", "each"), [("lora", 4), ("full", 6), ("head", 2)])
def test_time_counts_what_is_learned_and_evaluated(
    method: str, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "measured_rate", lambda _: 1e6)
    sizes = ["data.validation=5", "data.test=8", "training.eval_every=5"]
    settings = recipe(f"method={method}", "training.accumulate=2", *sizes)
    time = time_of(settings, size_of(settings, CONFIG), Lengths(7, 10))
    examples = each * 10 * 3 * 2 + 2 * (3 * 5 + 8)
    assert time.operations == WEIGHTS * 7 * examples
    assert time.seconds == time.operations / 4e5


def test_a_rate_is_measured_here() -> None:
    assert measured_rate("float32") > 1e8


def test_lengths_are_of_texts_patches_and_steps(bert_folder: Path) -> None:
    settings = load("understanding-bbc", [f"model={bert_folder}", "data.train=8", "data.test=4"])
    config = transformers.AutoConfig.from_pretrained(bert_folder)
    task = understanding.prepare(settings, 4)
    assert len(task.train) == 4
    found = lengths_of(settings, config, task)
    assert found is not None
    assert found.longest == 48
    assert found.usual == sum(len(row["input_ids"]) for row in task.train) / 4
    assert lengths_of(load("paper-glue-rte"), config, None) == Lengths(64, 64)  # its positions
    vision = transformers.Dinov2Config(image_size=518, patch_size=14)
    assert lengths_of(load("paper-vtab-dtd"), vision, None) == Lengths(257, 257)
    assert lengths_of(load("rl-push"), None, None) == Lengths(30, 30)
    residual: Any = transformers.ResNetConfig()
    assert lengths_of(load("images-ring"), residual, None) is None


def test_nothing_is_left_on_the_meta_device() -> None:
    size_of(recipe(), CONFIG)
    assert torch.empty(1).device.type == "cpu"
