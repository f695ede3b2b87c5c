"""Warnings that point at the user's own line."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import evatune
from tests.helpers import Toy, inputs


def test_a_warning_names_the_line_that_called_evatune() -> None:
    model = get_peft_model(Toy(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    with torch.no_grad(), pytest.warns(UserWarning, match="scale='paper'") as caught:
        evatune.initialize(model, inputs(), scale="paper", progress=None)
    assert caught[0].filename == __file__
