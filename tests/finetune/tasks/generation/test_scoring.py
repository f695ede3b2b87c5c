"""Measures of language generation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from evatune.finetune.tasks.generation import scoring
from evatune.finetune.tasks.generation.base import Pair
from evatune.loading.assets import asset
from evatune.loading.encoding import encode_answer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    folder = asset("llama-small")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_the_measures_are_those_of_the_definition(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    pairs = [Pair("2 + 2 =", " 4"), Pair("", "import os"), Pair("x", " y z w")]
    rows = [encode_answer(tokenizer, pair.prompt, pair.answer, 32) for pair in pairs]
    batch = transformers.DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    reduced = scoring.token_losses(logits, batch["labels"])
    found = scoring.measures(transformers.EvalPrediction(reduced.numpy(), batch["labels"].numpy()))
    losses = []
    for row in rows:  # one by one, without padding
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [
            -float(scores[i - 1, label]) for i, label in enumerate(row["labels"]) if label != -100
        ]
    assert math.log(found["perplexity"]) == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_the_score_is_the_mean_share_of_right_tokens() -> None:
    labels = np.array([[-100, 5, 6, 7, 8], [-100, -100, -100, 5, 6]])
    hits = np.array([[0, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    predictions = np.stack([np.zeros(hits.shape), hits], axis=-1)
    found = scoring.share_of_tokens(transformers.EvalPrediction(predictions, labels))
    assert found == {"score": (3 / 4 + 1 / 2) / 2, "perplexity": 1.0, "exact_match": 0.0}


def test_choices_are_weighed_by_their_likelihood(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    choices = (" os", " zqxv zqxv zqxv")
    sure = [Pair("import", answer, choices) for answer in choices]
    assert scoring.share_chosen(model, tokenizer, sure, 32) == 0.5
