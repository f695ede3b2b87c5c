"""Batches of TRL's trainers, as their models take them: preferences, and prompts to be answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evatune.choices import IGNORED
from evatune.errors import DataError

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PICTURES = ("image", "images")


def generates(trainer: Any) -> bool:
    """Return whether a trainer learns from what its model answers, as GRPO and RLOO do.

    Its sampler repeats prompts, for several answers or for several steps on one.
    """
    return hasattr(trainer, "num_generations") or hasattr(trainer, "_tokenize_prompts")


def is_prompts(batch: Any) -> bool:
    """Return whether a batch is a list of examples with a prompt each, which no collator joined."""
    return (
        isinstance(batch, list)
        and bool(batch)
        and all(isinstance(example, Mapping) and "prompt" in example for example in batch)
    )


def prompt_inputs(trainer: Any, batch: list[Mapping[str, Any]]) -> Any:
    """Return the prompts of a batch as padded tokens, by the tokenizer's chat template if chats.

    Nothing is generated: the answers of a model before training are its own and not the task's.

    Raises DataError for prompts with images.
    """
    if any(example.get(name) is not None for example in batch for name in _PICTURES):
        raise DataError(
            f"the prompts of {type(trainer).__name__} hold images, which are not read here; give"
            " batches of the model's inputs: evatune.initialize(trainer.model, batches)"
        )
    processor = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    options = getattr(trainer, "chat_template_kwargs", None) or {}
    tokens = [_tokens(tokenizer, example["prompt"], options) for example in batch]
    return dict(tokenizer.pad({"input_ids": tokens}, return_tensors="pt"))


def model_inputs(inputs: Any, *, labels: bool) -> Any:
    """Return what the model takes of a batch of chosen and rejected completions, or of rated ones.

    Both sides are examples of it already; what the trainer's loss needs besides is left out. Other
    batches come back as they are.

    Args:
        labels: add labels, by which tokens of prompts can be told from those of completions.
    """
    is_preference = isinstance(inputs, Mapping) and {"completion_mask", "margin"} & inputs.keys()
    if not is_preference or "labels" in inputs:
        return inputs
    taken = {key: inputs[key] for key in _INPUTS if key in inputs}
    if labels and "completion_mask" in inputs:
        prompt = inputs["completion_mask"] == 0
        taken["labels"] = inputs["input_ids"].masked_fill(prompt, IGNORED)
    return taken


def _tokens(tokenizer: Any, prompt: Any, options: Mapping[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        tokens: list[int] = tokenizer(prompt)["input_ids"]
        return tokens
    encoded = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    tokens = encoded["input_ids"]
    return list(tokens)
