"""Film review snippets, learned as plain text."""

from __future__ import annotations

import random

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs
from evatune.loading.corpora import ratings


def examples(train: int, test: int) -> Pairs:
    """Return film review snippets without a prompt."""
    texts = list(dict.fromkeys(text for text, _ in ratings("movie")))
    random.Random(0).shuffle(texts)
    pairs = [Pair("", text) for text in texts]
    return Pairs(pairs[:train], pairs[train : train + test])


TASK = GenerationTask("reviews", examples)
