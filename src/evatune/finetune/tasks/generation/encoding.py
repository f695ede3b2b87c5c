"""Tokens and labels of a prompt with its answer."""

from __future__ import annotations

from typing import Any

from evatune.finetune.tasks.generation.base import Pair
from evatune.loading.texts import CHARACTERS_PER_TOKEN

IGNORED = -100  # the label of a token that the loss leaves out


def encode(tokenizer: Any, pair: Pair, longest: int) -> dict[str, list[int]]:
    """Return the tokens of prompt and answer with an end, and labels on the answer only.

    What is too long is cut: the answer's end, then the prompt's start.
    """
    # Tokenizers take minutes for what is cut afterwards.
    characters = longest * CHARACTERS_PER_TOKEN
    prompt = _special(tokenizer.bos_token_id)
    prompt += tokenizer(pair.prompt[-characters:], add_special_tokens=False)["input_ids"]
    answer = tokenizer(pair.answer[:characters], add_special_tokens=False)["input_ids"]
    answer = [*answer, *_special(tokenizer.eos_token_id)][: longest - 1]
    prompt = prompt[max(0, len(prompt) + len(answer) - longest) :]
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * (len(prompt) + len(answer)),
        "labels": [IGNORED] * len(prompt) + answer,
    }


def _special(token: int | None) -> list[int]:
    return [] if token is None else [token]
