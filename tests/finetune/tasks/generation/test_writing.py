"""What a model writes after prompts."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from evatune.finetune.tasks.generation.writing import written
from tests.conftest import tiny_tokenizer

torch.set_num_threads(1)


def test_a_models_own_options_of_writing_are_set_aside(llama_folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    tokenizer = tiny_tokenizer()
    prompts = [[3, 4, 5], [6, 7]]
    likeliest = written(model, tokenizer, prompts, 12)
    assert any(len(set(text.split())) < len(text.split()) for text in likeliest)
    model.generation_config.no_repeat_ngram_size = 1
    assert written(model, tokenizer, prompts, 12) == likeliest
    assert model.generation_config.no_repeat_ngram_size == 1
