"""`evatune.initialize` on models: what is refused, and what stays as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import EvaConfig
from torch import Tensor, nn

import evatune
from evatune.errors import AdapterError, ConfigError, LayerError, TargetError
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
