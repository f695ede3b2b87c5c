"""Tokens and labels of a prompt with its answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from evatune.finetune.tasks.generation.encoding import encode

from evatune.finetune.tasks.generation.base import Pair
from evatune.loading.assets import asset

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    folder = asset("llama-small")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_what_is_too_long_loses_the_start_of_the_prompt(llama: tuple[Any, Any]) -> None:
    _, tokenizer = llama
    row = encode(tokenizer, Pair("a b c d e f g h i j k l m n o p", " yes"), 8)
    answer = [*tokenizer(" yes")["input_ids"], tokenizer.eos_token_id]
    assert len(row["input_ids"]) == 8
    assert row["input_ids"][-len(answer) :] == answer
    assert row["labels"] == [-100] * (8 - len(answer)) + answer
