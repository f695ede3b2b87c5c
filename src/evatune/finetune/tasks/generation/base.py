"""Prompts with answers, and a task of the domain that makes them.

All of it is made from a seed, or comes with Python or the package index. The pre-training of the
small model (scripts/pretrain/llama_small.py) sees none of it: it leaves out the modules of
`code.held_out`, and the texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A prompt and the answer to learn.

    `choices` are all answers to weigh, where there are given ones.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """Pairs to learn from and to be tested on; no prompt is in both."""

    train: list[Pair]
    test: list[Pair]


@dataclass(frozen=True)
class GenerationTask:
    """A task with data of its own.

    Attributes:
        name: in recipes.
        examples: numbers of pairs to train and to test on → pairs, fewer if there are not enough.
        final_answer: reads the answer off a written solution; the task is then scored by solutions
            that the model writes.
    """

    name: str
    examples: Callable[[int, int], Pairs]
    final_answer: Callable[[str], str] | None = None
