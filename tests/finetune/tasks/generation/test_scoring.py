"""Measures of language generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from evatune.finetune.tasks.generation import arithmetic, scoring
from evatune.finetune.tasks.generation.base import Pair
from evatune.finetune.tasks.generation.encoding import encode
from evatune.loading.assets import asset

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    folder = asset("llama-small")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_the_measures_are_those_of_the_definition(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    pairs = [Pair("2 + 2 =", " 4"), Pair("", "import os"), Pair("x", " y z w")]
    rows = [encode(tokenizer, pair, 32) for pair in pairs]
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


class _Parrot:
    """Writes the right solutions in the order of the problems, wrong ones from `good` on."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, pairs: list[Pair], good: int) -> None:
        texts = [pair.answer if i < good else "1 + 1 = 999" for i, pair in enumerate(pairs)]
        self.answers = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")[
            "input_ids"
        ]

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, self.answers], dim=1)


def test_a_solution_counts_by_its_final_number(llama: tuple[Any, Any]) -> None:
    _, tokenizer = llama
    pairs = arithmetic.examples(10, 0).train
    assert (
        scoring.share_solved(
            _Parrot(tokenizer, pairs, 7), tokenizer, pairs, arithmetic.final_answer
        )
        == 0.7
    )


def test_choices_are_weighed_by_their_likelihood(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    choices = (" os", " zqxv zqxv zqxv")
    sure = [Pair("import", answer, choices) for answer in choices]
    assert scoring.share_chosen(model, tokenizer, sure, 32) == 0.5
