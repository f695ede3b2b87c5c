"""Arithmetic word problems with worked solutions."""

from __future__ import annotations

import random

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs, drawn

# a token each, so that problems are short
_NAMES = (
    "David",
    "Jack",
    "Paul",
    "John",
    "Mark",
    "Michael",
    "Tony",
    "Charles",
)
_THINGS = (
    "games",
    "films",
    "phones",
    "points",
    "shares",
    "jobs",
    "files",
    "names",
    "words",
    "keys",
    "items",
    "lines",
    "bytes",
    "numbers",
    "shows",
    "awards",
    "devices",
    "messages",
)
_SUBTRACT = ("gives {b} to {other}", "loses {b}", "sells {b}", "throws {b} away")
_ADD = ("buys {b} more", "finds {b} more", "gets {b} from {other}", "takes {b} more")


def examples(train: int, test: int) -> Pairs:
    """Return word problems with worked solutions."""
    return drawn(_problem, train, test)


def _problem(source: random.Random) -> Pair:
    """Return one addition or subtraction, or groups of equal size."""
    name, other = source.sample(_NAMES, 2)
    thing = source.choice(_THINGS)
    if source.random() < 0.25:
        a, b, sign = source.randint(2, 9), source.randint(2, 9), "*"
        story = f"{name} has {a} boxes of {b} {thing}"
    else:
        a, b, sign = source.randint(11, 99), source.randint(1, 9), source.choice("+-")
        step = source.choice(_ADD if sign == "+" else _SUBTRACT).format(b=b, other=other)
        story = f"{name} has {a} {thing}, {step}"
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return Pair(f"{story}. Now?\n", f"{a} {sign} {b} = {result}")


TASK = GenerationTask("arithmetic", examples, one_right=True)
