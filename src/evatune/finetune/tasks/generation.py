"""Language generation: answers to prompts, judged by what a language model writes or finds
likely."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor

from evatune.errors import ConfigError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks import language
from evatune.finetune.tasks.language import Pair
from evatune.finetune.tasks.task import Task
from evatune.loading import user_data as own
from evatune.loading.assets import asset
from evatune.loading.text import CHARACTERS_PER_TOKEN, reading, require_path

TASKS = tuple(language.TASKS)
_ANSWER_TOKENS = 40  # of a solution that is written; the longest worked solution has fewer
_TOGETHER = 100  # sequences
_LARGEST_LOSS = 100.0  # of a run that diverged; its exponential is still a number


def prepare(recipe: Recipe) -> Task:
    """Load everything a run needs. The examples depend on the sizes alone, not on the run's seed.

    The loss counts the answer's tokens only. The score is, by task: the share of problems whose
    written solution ends in the right number (arithmetic); of questions whose right choice is the
    most likely one, as a sum over its tokens (commonsense); else one over the perplexity per
    character, so that models with other tokenizers can be compared.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where model or data
    cannot be had.
    """
    data = recipe.data
    pairs = _own(recipe) if data.source is not None else _ours(recipe)
    source = asset("llama-small") if recipe.model == "demo" else recipe.model
    require_path(source, "model")
    instead = (
        "a local folder with config.json, weights and tokenizer, or model=demo as in the recipe"
        " generation-code"
    )
    with reading(source, "a causal language model and its tokenizer", instead):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=recipe.trust_remote_code
        )
        # Adapters are float32 above a 16-bit base; weights that are trained themselves must not be
        # of 16 bits.
        half = recipe.training.precision == "bf16" and recipe.method != "full"
        dtype = torch.bfloat16 if half else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=recipe.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # By length, so that little of a batch is padding; no measure sees the order.
    tests = sorted(
        pairs.test, key=lambda pair: len(_encode(tokenizer, pair, data.max_length)["input_ids"])
    )

    def evaluate(model: Any, _: Path) -> dict[str, float]:
        if recipe.task == "arithmetic":
            return {"score": _solved(model, tokenizer, tests)}
        return {"score": _chosen(model, tokenizer, tests, data.max_length)}

    test = [_encode(tokenizer, pair, data.max_length) for pair in tests]
    answers = [
        token
        for row in test
        for token in row["labels"]
        if token not in (-100, tokenizer.eos_token_id)
    ]
    judged = recipe.task == "arithmetic" or any(pair.choices for pair in tests)
    return Task(
        model=model,
        train=datasets.Dataset.from_list(
            [_encode(tokenizer, pair, data.max_length) for pair in pairs.train]
        ),
        test=datasets.Dataset.from_list(test),
        collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        head=["lm_head"],
        new_head=False,
        task_type="CAUSAL_LM",
        metric=(
            measures
            if judged
            else partial(
                _with_score, tokens=len(answers), characters=len(tokenizer.decode(answers))
            )
        ),
        reduce=_per_token,
        evaluate=evaluate if judged else None,
    )


def measures(prediction: Any) -> dict[str, float]:
    """Perplexity per token of the answers, and the share of answers of which every token is the
    most likely one.

    The latter is the share that greedy decoding writes to the letter.
    """
    losses, hits = prediction.predictions[..., 0], prediction.predictions[..., 1]
    counted = prediction.label_ids[:, 1:] != -100
    mean = float(losses[:, 1:][counted].mean())
    exact = float(np.all((hits[:, 1:] == 1) | ~counted, axis=1).mean())
    return {"perplexity": math.exp(min(mean, _LARGEST_LOSS)), "exact_match": exact}


def _with_score(prediction: Any, tokens: int, characters: int) -> dict[str, float]:
    found = measures(prediction)
    return {"score": found["perplexity"] ** (-tokens / characters), **found}


def _per_token(logits: Any, labels: Tensor) -> Tensor:
    """Loss, and whether the token is the most likely one: (batch, length, 2); the first place has
    no prediction."""
    scores = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    targets = labels[:, 1:].clamp(min=0)
    losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
    found = torch.stack([losses, (scores.argmax(-1) == targets).float()], dim=-1)
    return torch.nn.functional.pad(found, (0, 0, 1, 0))


def _encode(tokenizer: Any, pair: Pair, longest: int) -> dict[str, list[int]]:
    """Tokens of prompt and answer with an end; labels on the answer only. What is too long is cut:
    the answer's end, then the prompt's start."""
    begin, end = (
        [] if token is None else [token]
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    reach = longest * CHARACTERS_PER_TOKEN  # tokenizers take minutes for what is cut afterwards
    prompt = begin + tokenizer(pair.prompt[-reach:], add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(pair.answer[:reach], add_special_tokens=False)["input_ids"], *end][
        : longest - 1
    ]
    prompt = prompt[max(0, len(prompt) + len(answer) - longest) :]
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * (len(prompt) + len(answer)),
        "labels": [-100] * len(prompt) + answer,
    }


@torch.no_grad()
def _solved(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    """Share of problems whose greedily written solution ends in the right answer."""
    right = 0
    for start in range(0, len(pairs), _TOGETHER):
        some = pairs[start : start + _TOGETHER]
        prompts = [(tokenizer.bos_token or "") + pair.prompt for pair in some]
        batch = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        written = model.generate(
            **batch,
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(
            language.final_answer(text) == language.final_answer(pair.answer)
            for text, pair in zip(texts, some, strict=True)
        )
    return right / len(pairs)


@torch.no_grad()
def _chosen(model: Any, tokenizer: Any, pairs: list[Pair], longest: int) -> float:
    """Share of questions whose right choice has the largest likelihood."""
    encoded = [
        (number, choice, _encode(tokenizer, Pair(pair.prompt, choice), longest))
        for number, pair in enumerate(pairs)
        for choice in pair.choices
    ]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    best: dict[int, tuple[float, str]] = {}
    for start in range(0, len(encoded), 4 * _TOGETHER):
        some = encoded[start : start + 4 * _TOGETHER]
        batch = collate([dict(one) for _, _, one in some]).to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = (
            (_per_token(logits, batch["labels"])[:, 1:, 0] * (batch["labels"][:, 1:] != -100))
            .sum(1)
            .tolist()
        )
        for (number, choice, _), loss in zip(some, losses, strict=True):
            best[number] = min(best.get(number, (math.inf, "")), (loss, choice))
    return sum(best[number][1] == pair.answer for number, pair in enumerate(pairs)) / len(pairs)


def _ours(recipe: Recipe) -> language.Pairs:
    own.require_task(recipe.task, TASKS, "language generation")
    data = recipe.data
    pairs = language.TASKS[recipe.task](data.train, data.test)
    if len(pairs.train) < data.train or len(pairs.test) < data.test:
        raise ConfigError(
            f"data.train is {data.train} and data.test {data.test}, but task {recipe.task!r} has"
            f" {len(pairs.train)} and {len(pairs.test)} examples; lower them"
        )
    return pairs


def _own(recipe: Recipe) -> language.Pairs:
    """Prompts and answers of the user's data, or texts without a prompt."""
    columns = recipe.data.columns or ["text"]
    if len(columns) > 2:
        raise ConfigError(
            f"data.columns is {columns}; give the prompt's and the answer's column, or the text's"
            " alone"
        )
    parts = own.split(recipe, columns, TASKS, "generation-code")
    return language.Pairs(
        *([_pair([str(row[column]) for column in columns]) for row in part] for part in parts)
    )


def _pair(texts: list[str]) -> Pair:
    return Pair(f"{texts[0]}\n", texts[1]) if len(texts) == 2 else Pair("", texts[0])
