"""Measures of language generation: what a model writes, and what it finds likely."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from evatune.finetune.tasks.generation.base import Pair
from evatune.finetune.tasks.generation.encoding import IGNORED, encode

_ANSWER_TOKENS = 40  # of a solution that is written; the longest worked solution has fewer
_BATCH_SIZE = 100  # sequences
_LARGEST_LOSS = 100.0  # of a run that diverged; its exponential is still a number


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Return each token's loss, and 1 where it is the most likely one, else 0.

    Returns:
        (batch, length, 2); the first position has no prediction.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    scores = logits[:, :-1].float()
    targets = labels[:, 1:].clamp(min=0)
    losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
    hits = (scores.argmax(-1) == targets).float()
    return torch.nn.functional.pad(torch.stack([losses, hits], dim=-1), (0, 0, 1, 0))


def measures(prediction: Any) -> dict[str, float]:
    """Return the answers' perplexity per token, and the share that greedy decoding would write.

    An answer counts as an exact match if each of its tokens is the most likely one.
    """
    losses, hits = prediction.predictions[..., 0], prediction.predictions[..., 1]
    counted = prediction.label_ids[:, 1:] != IGNORED
    mean = float(losses[:, 1:][counted].mean())
    exact = float(np.all((hits[:, 1:] == 1) | ~counted, axis=1).mean())
    return {"perplexity": math.exp(min(mean, _LARGEST_LOSS)), "exact_match": exact}


def scored_measures(prediction: Any, tokenizer: Any) -> dict[str, float]:
    """Return the measures, with one over the perplexity per character as the score."""
    measured = measures(prediction)
    labels = prediction.label_ids
    answers = labels[(labels != IGNORED) & (labels != tokenizer.eos_token_id)]
    characters = len(tokenizer.decode(answers))
    return {"score": measured["perplexity"] ** (-len(answers) / characters), **measured}


@torch.no_grad()
def share_solved(
    model: Any, tokenizer: Any, pairs: list[Pair], final_answer: Callable[[str], str]
) -> float:
    """Return the share of problems whose greedily written solution ends in the right answer."""
    solved = 0
    for start in range(0, len(pairs), _BATCH_SIZE):
        problems = pairs[start : start + _BATCH_SIZE]
        solutions = _write(model, tokenizer, [pair.prompt for pair in problems])
        for solution, pair in zip(solutions, problems, strict=True):
            solved += final_answer(solution) == final_answer(pair.answer)
    return solved / len(pairs)


def _write(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Return what the model writes after each prompt, by greedy decoding."""
    batch = tokenizer(
        [(tokenizer.bos_token or "") + prompt for prompt in prompts],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    written = model.generate(
        **inputs,
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt_length = inputs["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(written[:, prompt_length:], skip_special_tokens=True)
    return texts


@torch.no_grad()
def share_chosen(model: Any, tokenizer: Any, pairs: list[Pair], longest: int) -> float:
    """Return the share of questions whose right choice has the largest likelihood."""
    candidates = [
        (number, choice, encode(tokenizer, Pair(pair.prompt, choice), longest))
        for number, pair in enumerate(pairs)
        for choice in pair.choices
    ]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    best: dict[int, tuple[float, str]] = {}
    for start in range(0, len(candidates), 4 * _BATCH_SIZE):
        some = candidates[start : start + 4 * _BATCH_SIZE]
        batch = collate([dict(encoded) for _, _, encoded in some]).to(model.device)
        for (number, choice, _), loss in zip(some, _answer_losses(model, batch), strict=True):
            best[number] = min(best.get(number, (math.inf, "")), (loss, choice))
    right = [best[number][1] == pair.answer for number, pair in enumerate(pairs)]
    return sum(right) / len(right)


def _answer_losses(model: Any, batch: Any) -> list[float]:
    """Return the loss of each sequence's answer, summed over its tokens."""
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = token_losses(logits, labels)[:, 1:, 0]
    summed: list[float] = (losses * (labels[:, 1:] != IGNORED)).sum(1).tolist()
    return summed
