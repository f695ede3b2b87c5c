"""Arithmetic word problems with worked solutions."""

from __future__ import annotations

import random

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs

_NAMES = (
    "Ann",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
)
_THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cakes",
    "pens",
    "stones",
    "tickets",
    "eggs",
    "stamps",
    "balls",
    "letters",
)
_SUBTRACT = ("gives {b} to {other}", "loses {b}", "sells {b}", "throws {b} away")
_ADD = ("buys {b} more", "finds {b} more", "gets {b} from {other}", "takes {b} more")


def examples(train: int, test: int) -> Pairs:
    """Return word problems with worked solutions."""
    source = random.Random(0)
    pairs: dict[str, Pair] = {}
    # there are a hundred thousand; a repeated one is drawn now and then
    while len(pairs) < train + test:
        pair = _problem(source)
        pairs[pair.prompt] = pair
    problems = list(pairs.values())
    return Pairs(problems[:train], problems[train:])


def final_answer(text: str) -> str:
    """Return what a solution says its answer is; empty if it says none."""
    lines = text.strip().splitlines()
    if not lines or "=" not in lines[0]:
        return ""
    return lines[0].rpartition("=")[2].strip(" .")


def _problem(source: random.Random) -> Pair:
    """Return one addition or subtraction, or groups of equal size."""
    name, other = source.sample(_NAMES, 2)
    thing = source.choice(_THINGS)
    if source.random() < 0.25:
        a, b, sign = source.randint(2, 9), source.randint(2, 9), "*"
        story = f"{name} has {a} boxes of {b} {thing}"
    else:
        a, b, sign = source.randint(11, 30), source.randint(1, 9), source.choice("+-")
        step = source.choice(_ADD if sign == "+" else _SUBTRACT).format(b=b, other=other)
        story = f"{name} has {a} {thing}, {step}"
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return Pair(f"{story}. How many {thing} now?\n", f"{a} {sign} {b} = {result}")


TASK = GenerationTask("arithmetic", examples, final_answer=final_answer)
