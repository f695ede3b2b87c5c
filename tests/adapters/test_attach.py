"""A plain LoRA adapter around a model."""

from __future__ import annotations

import pytest
from torch import nn

from evatune.adapters.attach import add_lora
from evatune.errors import TargetError
from tests.helpers import Toy


def test_the_adapter_is_what_the_options_say() -> None:
    model = add_lora(Toy(), rank=3, alpha=6, targets=["q", "up"], exclude=["blocks.1.up"])
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3, 6)
    assert model.targeted_module_names == ["blocks.0.q", "blocks.0.up", "blocks.1.q"]


def test_exclusions_that_match_nothing_name_the_layers() -> None:
    with pytest.raises(TargetError, match=r"leaves out none .* they are blocks\.0\.q"):
        add_lora(Toy(), rank=3, alpha=6, targets="all-linear", exclude=["nothing"])


def test_a_refusal_of_pefts_is_not_blamed_on_an_exclusion_that_nobody_gave() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1, groups=3))
    with pytest.raises(TargetError, match=r"PEFT takes no adapter of rank 4 there \(.*group"):
        add_lora(model, rank=4, alpha=4, targets="0")
