"""Variants of LoRA: those that fit EVA, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
)
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

import evatune
from evatune.adapters.compat import get_eva_state_dict
from evatune.errors import AdapterError, DataError
from tests.adapters.helpers import GONE, adapted, parameters, train
from tests.helpers import lora_layers, round_trip, tiny_llama, tokens


class SomethingNew(DoraLinearVariant):
    """A variant of a PEFT that is to come."""


def of_something_new() -> PeftModel:
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    lora_layers(model)[GONE].lora_variant["default"] = SomethingNew()
    return model


def unbuilt(option: str, value: Any) -> Callable[[], PeftModel]:
    """With an option that PEFT takes on other layers, or together with other adapters only."""

    def build() -> PeftModel:
        model = adapted(tiny_llama(), target_modules=["q_proj"])
        setattr(model.peft_config["default"], option, value)
        return model

    return build


def of(**options: Any) -> Callable[[], PeftModel]:
    return lambda: adapted(tiny_llama(), target_modules=["q_proj"], **options)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (of(init_lora_weights="mica"), "MiCA.*freezes B"),
        (of(init_lora_weights="pissa"), "'pissa', which changes the base weights"),
        (of(kasa_config=KasaConfig()), "kasa_config set.*takes singular values off"),
        (
            of(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
            "use_bdlora set.*block-diagonal",
        ),
        (unbuilt("arrow_config", ArrowConfig()), "arrow_config set.*routes"),
        (unbuilt("use_qalora", True), "use_qalora set.*group means"),
        (of_something_new, f"SomethingNew, for example at {GONE}"),
    ],
)
def test_variants_that_do_not_fit_are_refused_by_name(
    build: Callable[[], PeftModel], text: str
) -> None:
    model = build()
    before = parameters(model)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(AdapterError, match=text):
            evatune.initialize(model, tokens(4), **options)
    model.peft_config["default"].eva_config = EvaConfig()
    with pytest.raises(AdapterError, match=text):
        get_eva_state_dict(model, tokens(4), show_progress_bar=False)
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_dora_fits_convolutions(dimensions: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        return nn.Sequential(conv(3, 8, 2), nn.Tanh(), conv(8, 8, 2))

    batches = [torch.randn(4, 3, *[5] * dimensions) for _ in range(4)]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], use_dora=True)
    round_trip(build, lora, batches, tmp_path)


INVOCATION = [58, 59]


def invoking(count: int = 4) -> list[dict[str, Tensor]]:
    """Batches whose texts have the invocation at different places, twice, or not at all."""
    batches = tokens(count, padded=True)
    for batch in batches:
        batch["input_ids"].clamp_(max=57)
        for row, places in enumerate(([4], [], [0], [2, 7])):
            for place in places:
                batch["input_ids"][row, place : place + 2] = torch.tensor(INVOCATION)
    return batches


def after_invocation(x: Tensor, batch: dict[str, Tensor], name: str) -> Tensor:
    kept = torch.zeros(4, 12, dtype=torch.bool)
    kept[0, 4:], kept[2, 0:], kept[3, 7:] = True, True, True
    return x[kept & batch["attention_mask"].bool()]


@pytest.mark.filterwarnings("ignore:Cannot calculate aLoRA offsets")
def test_of_activated_lora_the_rows_from_the_invocation_on_count(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"],
        "alora_invocation_tokens": INVOCATION,
    }
    model, other = adapted(tiny_llama(), **options), adapted(tiny_llama(), **options)
    found = evatune.initialize(model, invoking())
    chosen = evatune.initialize(other, invoking(), rows=after_invocation)
    assert found.spectra[GONE].rows == chosen.spectra[GONE].rows == 4 * (3 + 3 + 5)
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    batch = invoking()[0]
    assert torch.allclose(loaded(**batch).logits, model.eval()(**batch).logits, atol=1e-5)


def test_activated_lora_needs_its_tokens_in_the_data() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with pytest.raises(DataError, match=r"alora_invocation_tokens=\[1, 2\].*occur in no batch"):
        evatune.initialize(model, tokens(4))
    embedded = [{"inputs_embeds": torch.randn(2, 5, 16)}]
    with pytest.raises(DataError, match="no input_ids"):
        evatune.initialize(model, embedded)
