"""Texts that a model writes after prompts, by greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

_WINDOW = 24  # last tokens of an answer, in which a stop word is looked for


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt as in training, where an answer's own follow."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return start + tokens


@torch.no_grad()
def written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    new_tokens: int,
    stop_words: Sequence[str] = (),
) -> list[str]:
    """Return what a model writes after each prompt, decoded at once.

    Each token is the likeliest, whatever options of writing the model comes with.

    Args:
        prompts: tokens. new_tokens: at most.
        stop_words: a text that holds one goes on no further; what follows it may be there in part.
    """
    longest = max(map(len, prompts))
    filled = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in prompts]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
    options = transformers.GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with _own_options_aside(model):
        tokens = model.generate(
            input_ids=torch.tensor(filled, dtype=torch.int64, device=model.device),
            attention_mask=torch.tensor(mask, dtype=torch.int64, device=model.device),
            generation_config=options,
            stopping_criteria=[_Stop(tokenizer, longest, stop_words)] if stop_words else None,
        )
    texts: list[str] = tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
    return texts


@contextmanager
def _own_options_aside(model: Any) -> Iterator[None]:
    """Set aside a model's own options of writing, with which transformers fills what is not given.

    Such are penalties on repetition, tokens that are forced or forbidden.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in owners]
    try:
        for module in owners:
            module.generation_config = transformers.GenerationConfig()
        yield
    finally:
        for module, options in zip(owners, kept, strict=True):
            module.generation_config = options


class _Stop(transformers.StoppingCriteria):  # type: ignore[misc]
    """Ends a text once one of the words is among its last tokens."""

    def __init__(self, tokenizer: Any, start: int, words: Sequence[str]) -> None:
        self.tokenizer, self.start, self.words = tokenizer, start, words

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last = input_ids[:, max(self.start, input_ids.shape[1] - _WINDOW) :]
        texts = self.tokenizer.batch_decode(last)
        done = [any(word in text for word in self.words) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
