"""Measures of language generation: what a model writes, and what it finds likely."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from evatune.choices import IGNORED
from evatune.finetune.tasks.generation.base import Pair
from evatune.loading.encoding import encode_answer

_LARGEST_LOSS = 100.0  # of a run that diverged; its exponential is still a number


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Return each token's loss, and 1 where it is the most likely one, else 0.

    Returns:
        (batch, length, 2); zero at the first position, which has no prediction, and where the
            label is ignored.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    counted = labels[:, 1:] != IGNORED
    scores = logits[:, :-1][counted].float()  # prompts and padding are most of a batch
    targets = labels[:, 1:][counted]
    scored: Tensor = scores.new_zeros(*labels.shape, 2)
    losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    scored[:, 1:][counted] = torch.stack([losses, (scores.argmax(-1) == targets).float()], dim=-1)
    return scored


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


def share_of_tokens(prediction: Any) -> dict[str, float]:
    """Return the measures, with the share of an answer's tokens that are right as the score.

    A token is right if it is the most likely one after the right ones before it. The score is the
    mean over the answers.
    """
    counted = prediction.label_ids[:, 1:] != IGNORED
    right = (prediction.predictions[:, 1:, 1] == 1) & counted
    shares = right.sum(1) / counted.sum(1)
    return {"score": float(shares.mean()), **measures(prediction)}


@torch.no_grad()
def share_chosen(
    model: Any, tokenizer: Any, pairs: list[Pair], longest: int, size: int = 400
) -> float:
    """Return the share of questions whose right choice has the largest likelihood.

    Args:
        longest: tokens of a question with a choice. size: of them that are run at once.
    """
    candidates = [
        (number, choice, encode_answer(tokenizer, pair.prompt, choice, longest))
        for number, pair in enumerate(pairs)
        for choice in pair.choices
    ]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    best: dict[int, tuple[float, str]] = {}
    for start in range(0, len(candidates), size):
        chunk = candidates[start : start + size]
        batch = collate([dict(encoded) for _, _, encoded in chunk]).to(model.device)
        for (number, choice, _), loss in zip(chunk, _answer_losses(model, batch), strict=True):
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
