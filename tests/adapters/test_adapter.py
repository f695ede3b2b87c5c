"""The adapter of a model: found, fresh, and plain LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import evatune
from evatune.errors import AdapterError
from tests.helpers import (
    Toy,
    lora,
    tiny_bert,
    tokens,
    train_a_little,
)


def test_a_model_without_an_adapter_is_told_how_to_get_one() -> None:
    with pytest.raises(AdapterError, match=r"Toy carries no adapter.*get_peft_model"):
        evatune.initialize(Toy(), [torch.zeros(1)])


def test_a_trained_adapter_is_not_overwritten() -> None:
    model = lora(tiny_bert())
    train_a_little(model, tokens()[0])
    with pytest.raises(AdapterError, match="already trained"):
        evatune.initialize(model, tokens())


def test_an_adapter_that_is_not_lora_is_refused() -> None:
    from peft import IA3Config

    model = get_peft_model(tiny_bert(), IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="IA3Config; EVA initializes LoRA"):
        evatune.initialize(model, tokens())
