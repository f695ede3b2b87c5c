"""Film reviews."""

from __future__ import annotations

import pytest

from evatune.finetune.tasks.generation import reviews
from evatune.finetune.tasks.generation.base import Pair


def test_a_snippet_that_occurs_twice_is_in_one_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = [(f"snippet {i % 30}", float(i)) for i in range(90)]  # each of them three times
    monkeypatch.setattr(reviews, "ratings", {"movie": snippets}.__getitem__)
    pairs = reviews.examples(20, 10)
    assert (len(pairs.train), len(pairs.test)) == (20, 10)
    assert sorted(pair.answer for pair in (*pairs.train, *pairs.test)) == sorted(
        {text for text, _ in snippets}
    )


def test_a_review_is_learned_without_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "ratings", lambda _: [("dull", -2.0), ("fine", 2.0)])
    pairs = reviews.examples(1, 1)
    assert sorted((*pairs.train, *pairs.test), key=lambda pair: pair.answer) == [
        Pair("", "dull"),
        Pair("", "fine"),
    ]
