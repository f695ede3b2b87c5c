"""Errors of grammar that code puts into real sentences: is there one, of which kind is it?

Windows of ten words of BBC news, in some of which a word is replaced by another form of it, or by
its rival, such as "is" by "are"; or several are. Which words they are is not said. Training,
validation and test come from different articles.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

_WORDS = 10  # of a window
_FIRST = 2  # no word before this one is replaced: what it depends on is often cut off
_SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}  # of the articles

_Rivals = Mapping[str, list[str]]


def _rivals(*groups: str) -> dict[str, list[str]]:
    """Return for each word the others of its groups."""
    others_of: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        words = group.split("/")
        for word in words:
            others_of[word] += [other for other in words if other != word]
    return dict(others_of)


def _union(tables: Iterable[_Rivals]) -> _Rivals:
    others_of: dict[str, list[str]] = defaultdict(list)
    for table in tables:
        for word, others in table.items():
            others_of[word] += others
    return dict(others_of)


def _plurals(nouns: str) -> Iterator[str]:
    return (f"{noun}/{noun}s" for noun in nouns.split())


ERRORS: dict[str, _Rivals] = {  # task → word → what it is replaced by
    "agreement": _rivals("is/are", "was/were", "has/have"),
    "pronoun": _rivals(
        *["he/him", "she/her", "they/them", "we/us", "I/me", "their/them", "our/us", "his/him"],
    ),
    "preposition": _rivals("in/on/at/for/of/with/by/from/to"),
    "form": _rivals(
        *[
            "be/been",
            "be/being",
            "make/making",
            "make/made",
            "take/taking",
            "take/taken",
            "go/going",
            "get/getting",
            "give/given",
            "see/seen",
            "do/done",
            "do/doing",
            "come/coming",
            "work/working",
            "play/playing",
            "win/winning",
            "use/using",
            "say/saying",
            "become/becoming",
            "show/shown",
            "know/known",
            "help/helping",
            "look/looking",
            "set/setting",
            "run/running",
            "lead/leading",
            "pay/paying",
            "buy/buying",
            "sell/selling",
            "try/trying",
            "find/finding",
            "keep/keeping",
            "put/putting",
            "start/starting",
            "meet/meeting",
            "lose/losing",
            "face/facing",
            "call/called",
            "call/calling",
            "need/needed",
            "want/wanted",
            "add/added",
            "hit/hitting",
            "leave/leaving",
            "build/building",
            "hold/holding",
            "bring/bringing",
            "provide/providing",
        ]
    ),
    "number": _rivals(
        *_plurals(
            """year day month week player game film point minister government party group firm
            service sale price system user member artist actor star award result problem rule plan
            job team fan song record right law leader report site phone computer network market
            share bank cost tax figure number thing part side hour minute goal title match show
            programme club device customer consumer worker voter issue way"""
        ),
        *[
            "company/companies",
            "country/countries",
            "city/cities",
            "man/men",
            "woman/women",
            "child/children",
        ],
    ),
}
_ALL = _union(ERRORS.values())
KIND = "kind"
"""The task whose windows all hold an error, and whose classes are the keys of ERRORS."""
ANY = "any"
"""The task in which half of the windows hold three errors, of any kind."""
PAIR = "pair"
"""The task whose windows all hold errors of two kinds, and whose classes are the pairs of kinds."""
TASKS = (*ERRORS, KIND, ANY, PAIR)
CLASSES = dict.fromkeys(TASKS, 2) | {KIND: len(ERRORS), PAIR: comb(len(ERRORS), 2)}
"""The number of classes of a task."""


@dataclass(frozen=True)
class Sentences:
    """Texts with their classes."""

    texts: list[str]
    labels: list[int]


def sentences(task: str, articles: Iterable[str]) -> dict[str, Sentences]:
    """Return all examples of a task by part: train, validation, test.

    Classes are 0, no error, and 1; of the tasks "kind" and "pair", the number of the kind or pair.
    They are as frequent as each other, but for chance or the last round. It is all fixed by the
    articles.
    """
    parts = {}
    for part, windows in _windows(list(articles)).items():
        draw = random.Random(f"{task} {part}")
        draw.shuffle(windows)
        if task == KIND:
            parts[part] = _kinds(1, windows, draw)
        elif task == PAIR:
            parts[part] = _kinds(2, windows, draw)
        elif task == ANY:
            parts[part] = _judged(_ALL, 3, windows, draw)
        else:
            parts[part] = _judged(ERRORS[task], 1, windows, draw)
    return parts


def _windows(articles: list[str]) -> dict[str, list[list[str]]]:
    """Return the windows of each part, each once, which are of articles of its own."""
    order = np.random.default_rng(0).permutation(len(articles)).tolist()
    parts: dict[str, list[list[str]]] = {}
    seen: set[str] = set()  # agencies' sentences are in several articles
    start, share_before = 0, 0.0
    for part, share in _SHARES.items():
        share_before += share
        end = round(share_before * len(articles))
        parts[part] = []
        for window in (window for i in order[start:end] for window in _cut(articles[i])):
            key = " ".join(window).lower()
            if key not in seen:
                seen.add(key)
                parts[part].append(window)
        start = end
    return parts


def _cut(article: str) -> Iterator[list[str]]:
    words = article.split()
    for start in range(0, len(words) - _WORDS + 1, _WORDS):
        yield words[start : start + _WORDS]


def _judged(
    table: _Rivals, errors: int, windows: list[list[str]], draw: random.Random
) -> Sentences:
    """Return windows with so many words that can be replaced; by chance they are, or are not."""
    sentences = Sentences([], [])
    for window in windows:
        if len(_positions(window, table)) >= errors:
            label = draw.randrange(2)
            sentences.texts.append(" ".join(_spoiled(window, table, label * errors, draw)))
            sentences.labels.append(label)
    return sentences


def _kinds(count: int, windows: list[list[str]], draw: random.Random) -> Sentences:
    """Return windows with an error of each of so many kinds, which are the class.

    Only windows that three classes or more are possible in; they get the rarest of these.
    """
    sentences = Sentences([], [])
    classes = list(combinations(ERRORS.values(), count))
    counts = [0] * len(classes)
    for window in windows:
        possible = [number for number, tables in enumerate(classes) if _can_hold(window, tables)]
        if len(possible) >= 3:
            label = min(possible, key=lambda number: (counts[number], draw.random()))
            counts[label] += 1
            words = window
            for table in classes[label]:
                words = _spoiled(words, table, 1, draw)
            sentences.texts.append(" ".join(words))
            sentences.labels.append(label)
    return sentences


def _can_hold(window: list[str], tables: Iterable[_Rivals]) -> bool:
    """Return whether each table can replace a word, and none the word of another."""
    positions = [set(_positions(window, table)) for table in tables]
    return all(positions) and len(set.union(*positions)) == sum(map(len, positions))


def _positions(window: list[str], table: _Rivals) -> list[int]:
    """Return where a window has a word that the table can replace."""
    return [position for position in range(_FIRST, len(window)) if window[position] in table]


def _spoiled(window: list[str], table: _Rivals, count: int, draw: random.Random) -> list[str]:
    """Return the window with so many words replaced."""
    words, positions = list(window), _positions(window, table)
    for _ in range(count):
        position = draw.choice(positions)
        positions.remove(position)
        words[position] = draw.choice(table[window[position]])
    return words
