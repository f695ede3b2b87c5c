"""`evatune.initialize` on models: what is refused, and what stays as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig
from evatune.errors import AdapterError, BudgetError, ConfigError, LayerError, TargetError
from tests.helpers import (
    lora,
    tiny_bert,
    tokens,
)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: evatune.initialize(m), evatune.EvatuneError, "needs batches"),
        (
            lambda m: evatune.initialize(m, tokens(), adapter_name="x"),
            AdapterError,
            "no adapter 'x'.*'default'",
        ),
        (
            lambda m: evatune.initialize(m, tokens(), scale="big"),
            ConfigError,
            "paper, whiten, matched",
        ),
        (lambda m: evatune.initialize(m, tokens(), rank=0), ConfigError, "rank is 0"),
        (lambda m: evatune.initialize(m, tokens(), rho=0.5), ConfigError, "rho is 0.5"),
        (
            lambda m: evatune.initialize(m, tokens(), rank=20, rho=1),
            evatune.EvatuneError,
            "cannot be",
        ),
        (lambda m: evatune.initialize(m, []), evatune.EvatuneError, "empty"),
        (
            lambda m: evatune.initialize(
                m, [{key: value[:1, :3] for key, value in tokens()[0].items()}]
            ),
            LayerError,
            "3 rows for 8 components.*more data, or lower rank",
        ),
    ],
)
def test_bad_calls_say_what_to_do_and_leave_the_model_alone(
    call: Any, error: type[Exception], text: str
) -> None:
    model = lora(tiny_bert())
    before, config = snapshot(model), str(model.peft_config)
    with pytest.raises(error, match=text):
        call(model)
    assert str(model.peft_config) == config
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nan_in_one_layer_names_the_layer_and_the_batch() -> None:
    model = lora(tiny_bert(), target_modules=["query"])
    with torch.no_grad():
        model.base_model.model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(
        LayerError, match=r"encoder\.layer\.1\.attention\.self\.query \(first in batch 1\).*float32"
    ):
        evatune.initialize(model, tokens())


def narrow(**options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    return get_peft_model(model, LoraConfig(r=8, target_modules=["0", "2"], **options))


def test_layers_too_narrow_for_the_rank_are_told_before_any_batch_is_read() -> None:
    batches = iter(batches_of_rows())
    with pytest.raises(BudgetError, match=r"Below 8: 2 \(2\).*rank_pattern={'2': 2}\)"):
        evatune.initialize(narrow(), batches, rho=1)
    assert len(list(batches)) == 4
    calibration = evatune.initialize(narrow(rank_pattern={"2": 2}), batches_of_rows(), rho=1)
    assert calibration.allocate().ranks == {"0": 8, "2": 2}


def batches_of_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 8, generator=generator) for _ in range(4)]


def test_a_calibration_leaves_to_the_adapter_what_initialize_does() -> None:
    eva = EvaConfig(rho=1.5)
    model = lora(tiny_bert(), r=24, init_lora_weights="eva", eva_config=eva)
    config = evatune.calibrate(model, tokens(), CalibrationConfig(max_batches=1)).config
    assert (config.rank, config.rho, config.n_components) == (24, 1.5, 36)
    assert config.labels_only == "auto"
    given = CalibrationConfig(max_batches=1, rank=4, rho=1, components=5, labels_only=False)
    config = evatune.calibrate(model, tokens(), given).config
    assert (config.rank, config.rho, config.n_components) == (4, 1, 5)
    assert config.labels_only is False
    # for other ranks there are as many directions as without an adapter
    config = evatune.calibrate(lora(tiny_bert(), r=4), tokens()).config
    assert (config.rank, config.n_components) == (4, 32)


def test_of_several_adapters_a_calibration_asks_none() -> None:
    model = lora(tiny_bert(), r=4)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    assert evatune.calibrate(model, tokens()).config.rank == 16


def test_a_merged_adapter_is_refused() -> None:
    model = lora(tiny_bert())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        evatune.initialize(model, tokens())


def test_an_adapted_layer_of_another_kind_is_named() -> None:
    model = lora(
        nn.ModuleDict({"lin": nn.Linear(4, 4), "conv": nn.Conv1d(2, 2, 3, dilation=2)}),
        target_modules=["lin", "conv"],
    )
    with pytest.raises(
        TargetError, match=r"conv \(Conv1d, whose dilation.*exclude_modules.*on_unsupported='skip'"
    ):
        evatune.initialize(model, tokens())


def test_random_numbers_are_where_they_were() -> None:
    model = lora(tiny_bert())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evatune.initialize(model, tokens(8))
    assert torch.rand(1) == expected


def test_unit_rows_at_the_alpha_of_plain_lora_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match=r"scale='paper' with α/r = 2: .* lower a rate") as caught:
        calibration = evatune.initialize(lora(tiny_bert()), tokens(8), scale="paper")
    (message,) = [str(one.message) for one in caught if "scale=" in str(one.message)]
    ratio = 1 / calibration.learning_rate(1, "paper")
    assert f"change the outputs {ratio:.3g} times" in message


@pytest.mark.parametrize(
    ("model_options", "scale"),
    [
        ({"lora_alpha": 1}, "paper"),
        ({}, "matched"),
        ({}, "whiten-matched"),
        ({"init_lora_weights": "eva", "eva_config": EvaConfig(whiten=True)}, None),
    ],
)
def test_the_papers_alpha_and_other_scales_are_not_warned_of(
    model_options: dict[str, Any], scale: str | None
) -> None:
    model = lora(tiny_bert(), **model_options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="scale=")
        evatune.initialize(model, tokens(8), scale=scale)
