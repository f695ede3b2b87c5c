"""The one description of a layer: what it costs is what plan, table and adapter say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import evatune
from evatune.layers import LayerSpec
from evatune.report.summary import layer_rows, plan_of
from tests.helpers import Toy, inputs, tokens

torch.set_num_threads(1)
DATA = Path(__file__).parent / "data"


def test_a_rank_costs_a_row_of_a_and_a_column_of_b() -> None:
    assert LayerSpec("plain", 16, 32).parameters_per_rank == 16 + 32
    assert LayerSpec("grouped", 36, 8, groups=2).parameters_per_rank == 36 + 4


def test_a_layer_without_a_rank_group_is_its_own() -> None:
    assert LayerSpec("q", 4, 4).rank_key == "q"
    assert LayerSpec("experts.3", 4, 4, rank_group="experts").rank_key == "experts"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LayerSpec("q", 16, 32), "16→32"),
        (LayerSpec("conv", 36, 8, groups=2), "36→8 in 2 groups"),
        (LayerSpec("up.3", 8, 12, rank_group="up"), "8→12 as a part of up"),
    ],
)
def test_the_sizes_in_words(spec: LayerSpec, words: str) -> None:
    assert spec.described() == words


# -- a plan's parameters, the table's and the adapter's --------------------------------------------


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2, padding=1)
        self.plain = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.grouped(x)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [nn.functional.linear(x, weight) for weight in self.up]
        return torch.stack(outputs).sum(0)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = Experts(), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.experts(x.flatten(0, -2))))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )


def images() -> list[Tensor]:
    return list(torch.randn(4, 5, 4, 9, 8).cumsum(-1))


def ids() -> list[Tensor]:
    return list(torch.randint(0, 12, (4, 4, 10)))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], dict[str, Any]]] = {
    "Linear": (Toy, inputs, {"target_modules": "all-linear"}),
    "Conv1D of GPT-2": (gpt2, tokens, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "grouped Conv2d": (Convolutions, images, {"target_modules": ["grouped", "plain"]}),
    "Embedding": (Words, ids, {"target_modules": ["table", "head"]}),
    "MultiheadAttention": (Attends, inputs, {"target_modules": ["attention", "head"]}),
    "stacked experts": (
        Mixture,
        lambda: inputs(d=8),
        {"target_modules": ["head"], "target_parameters": ["experts.up"]},
    ),
}


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
)
@pytest.mark.parametrize("budget", ["ranks", "parameters"])
@pytest.mark.parametrize("layer_type", CASES)
def test_the_parameters_of_plan_table_and_adapter_are_the_same(
    layer_type: str, budget: str
) -> None:
    build, batches, options = CASES[layer_type]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about groups
        model = get_peft_model(build(), LoraConfig(r=2, **options))
    uniform = sum(p.numel() for p in model.parameters() if p.requires_grad)
    calibration = evatune.initialize(model, batches(), budget=budget)
    plan, problem = plan_of(calibration)
    assert problem is None
    assert plan.uniform_parameters == uniform
    assert plan.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parameters == sum(row.parameters for row in layer_rows(calibration, plan))


def test_a_plan_that_cannot_be_made_counts_the_uniform_parameters_as_one_that_can() -> None:
    config = evatune.CalibrationConfig(components=4, tolerance=0)
    targets = ["grouped", "plain"]
    torch.manual_seed(0)
    whole = evatune.calibrate(Convolutions(), images(), config, targets=targets)
    starved = evatune.calibrate(Convolutions(), [torch.zeros(1, 4, 9, 8)], config, targets=targets)
    plan, problem = plan_of(starved)
    assert problem is not None
    assert plan.uniform_parameters == plan_of(whole)[0].uniform_parameters
    assert plan.limit == plan_of(whole)[0].limit


# -- on disk ---------------------------------------------------------------------------------------


def layers_on_disk(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["record"])["layers"]


def test_groups_and_rank_groups_of_an_older_file_are_read_and_written_as_they_were(
    tmp_path: Path,
) -> None:
    path = DATA / "calibration-2.safetensors"
    calibration = evatune.Calibration.load(path)
    specs = {name: layer.spec for name, layer in calibration.layers.items()}
    assert specs["conv"] == LayerSpec("conv", 24, 8, groups=2)
    assert specs["attn.out_proj"] == LayerSpec("attn.out_proj", 8, 8, rank_group="attn")
    assert specs["experts.up.1"] == LayerSpec("experts.up.1", 8, 6, rank_group="experts.up")
    calibration.save(tmp_path / "again.safetensors")
    assert layers_on_disk(tmp_path / "again.safetensors") == layers_on_disk(path)
