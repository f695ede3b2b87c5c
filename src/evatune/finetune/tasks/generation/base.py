"""Prompts with answers, and a task of the domain that makes them.

All of it is made from a seed, or comes with Python or the package index. The pre-training of the
small model (scripts/pretrain/llama_small.py) sees none of it: it leaves out the modules of
`code.held_out`, and the texts.
"""

from __future__ import annotations

import random
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
        one_right: an answer has one right form, so that the score is the share of its tokens that
            are the most likely ones; a text has many, and is scored by how likely it is.
    """

    name: str
    examples: Callable[[int, int], Pairs]
    one_right: bool = False


def drawn(make: Callable[[random.Random], Pair], train: int, test: int) -> Pairs:
    """Return pairs that `make` draws, no prompt twice. It can draw far more than are asked for."""
    source = random.Random(0)
    pairs: dict[str, Pair] = {}
    while len(pairs) < train + test:
        pair = make(source)
        pairs[pair.prompt] = pair
    made = list(pairs.values())
    return Pairs(made[:train], made[train:])
