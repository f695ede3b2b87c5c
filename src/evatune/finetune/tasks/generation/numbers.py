"""Numbers in English words, to be written in digits."""

from __future__ import annotations

import random

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs, drawn

_SMALL = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = (
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
)
_LARGEST = 99_999


def examples(train: int, test: int) -> Pairs:
    """Return numbers of up to five digits."""
    return drawn(_spelled, train, test)


def words(number: int) -> str:
    """Return a number below a million in words, without "and"."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        return _joined(_TENS[number // 10 - 2], number % 10)
    if number < 1000:
        return _joined(f"{_SMALL[number // 100]} hundred", number % 100)
    return _joined(f"{words(number // 1000)} thousand", number % 1000)


def _joined(start: str, rest: int) -> str:
    return f"{start} {words(rest)}" if rest else start


def _spelled(source: random.Random) -> Pair:
    number = source.randint(1, _LARGEST)
    return Pair(f"{words(number)} = ", str(number))


TASK = GenerationTask("numbers", examples, one_right=True)
