"""Times of day as people say them, to be written with 24 hours."""

from __future__ import annotations

import random

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs, drawn
from evatune.finetune.tasks.generation.numbers import words


def examples(train: int, test: int) -> Pairs:
    """Return times of day; the same time may be in both parts in other words."""
    return drawn(_said, train, test)


def _said(source: random.Random) -> Pair:
    """Return a time in words and digits, and hours and minutes."""
    hour, minute = source.randrange(24), source.randrange(60)
    late = minute > 30
    named = (hour + late) % 24
    on_the_dial = named % 12 or 12
    said = source.choice((str(on_the_dial), words(on_the_dial)))
    side = f"{60 - minute} to" if late else f"{minute} past"
    half = source.choice(("am", "in the morning") if named < 12 else ("pm", "in the evening"))
    ask = source.choice(("{}", "at {}", "It is {}", "from {} on"))
    return Pair(f"{ask.format(f'{side} {said} {half}')} = ", f"{hour:02d}:{minute:02d}")


TASK = GenerationTask("clock", examples, one_right=True)
