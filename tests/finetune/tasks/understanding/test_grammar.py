"""Errors of grammar in real sentences."""

from __future__ import annotations

from itertools import combinations

import pytest

from evatune.finetune.tasks.understanding import grammar

# Every window of ten words has its article's number and its own, so that none occurs twice.
_ARTICLES = [
    " ".join(f"a{i} w{j} he is in year make a they has" for j in range(6)) for i in range(40)
]
_ORIGINALS = {f"a{i} w{j} he is in year make a they has": i for i in range(40) for j in range(6)}


def _differences(text: str) -> list[tuple[str, str]]:
    """Return the words that are not the original's, each as (original, replacement)."""
    words = text.split()
    original = next(one for one in _ORIGINALS if one.split()[:2] == words[:2]).split()
    return [(a, b) for a, b in zip(original, words, strict=True) if a != b]


@pytest.mark.parametrize("task", grammar.ERRORS)
def test_one_word_is_replaced_by_a_rival_where_the_label_says_so(task: str) -> None:
    for part in grammar.sentences(task, _ARTICLES).values():
        assert set(part.labels) == {0, 1}
        for text, label in zip(part.texts, part.labels, strict=True):
            changed = _differences(text)
            assert len(changed) == label
            assert all(new in grammar.ERRORS[task][old] for old, new in changed)


def test_a_kind_is_that_of_the_word_replaced_and_all_are_as_frequent() -> None:
    tables = list(grammar.ERRORS.values())
    for part in grammar.sentences(grammar.KIND, _ARTICLES).values():
        counts = [part.labels.count(kind) for kind in range(len(tables))]
        assert max(counts) - min(counts) <= 1
        for text, label in zip(part.texts, part.labels, strict=True):
            ((old, new),) = _differences(text)
            assert new in tables[label][old]


def test_a_pair_is_that_of_the_kinds_of_the_two_words_replaced() -> None:
    pairs = list(combinations(grammar.ERRORS.values(), 2))
    for part in grammar.sentences(grammar.PAIR, _ARTICLES).values():
        counts = [part.labels.count(pair) for pair in range(len(pairs))]
        assert max(counts) - min(counts) <= 1
        for text, label in zip(part.texts, part.labels, strict=True):
            changed = _differences(text)
            assert len(changed) == 2
            for table in pairs[label]:
                assert sum(new in table.get(old, []) for old, new in changed) == 1


def test_a_word_of_two_kinds_is_not_replaced_for_both() -> None:
    articles = [f"a{i} w show is show he in year make they" for i in range(40)]
    for part in grammar.sentences(grammar.PAIR, articles).values():
        assert all(len(text.split()) == 10 for text in part.texts)
        assert part.texts


def test_of_errors_of_any_kind_there_are_three_or_none() -> None:
    for part in grammar.sentences(grammar.ANY, _ARTICLES).values():
        assert set(part.labels) == {0, 1}
        for text, label in zip(part.texts, part.labels, strict=True):
            assert len(_differences(text)) == 3 * label


def test_parts_have_articles_of_their_own() -> None:
    parts = grammar.sentences("agreement", _ARTICLES)
    articles = [{text.split()[0] for text in part.texts} for part in parts.values()]
    assert [len(one) for one in articles] == [24, 6, 10]
    assert len(set.union(*articles)) == 40


def test_a_window_that_two_articles_share_is_in_one_part() -> None:
    parts = grammar.sentences("agreement", [_ARTICLES[0]] * 40)
    assert sum(len(part.texts) for part in parts.values()) == 6
