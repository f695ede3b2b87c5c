"""Real texts that need no hub."""

from __future__ import annotations

import torch

from evatune.loading import corpora

torch.set_num_threads(1)


def test_sentiment_has_both_labels_and_no_neutral_text() -> None:
    texts, labels = corpora.sentiment("tweet")
    assert len(texts) == len(labels) > 3000
    assert 0.2 < sum(labels) / len(labels) < 0.8
