"""Dates in several styles, rewritten in the style of ISO 8601."""

from __future__ import annotations

import random
from datetime import date, timedelta

from evatune.finetune.tasks.generation.base import GenerationTask, Pair, Pairs, drawn

_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_STYLES = (
    "{d} {month} {y}",
    "{month} {d}, {y}",
    "the {d} of {short} {y}",
    "{d}.{m}.{y}",
    "{m}/{d}/{y}",
)
_FIRST, _DAYS = date(1700, 1, 1), 146_097  # four centuries, as many days as any four have


def examples(train: int, test: int) -> Pairs:
    """Return dates of 1700 to 2099; the same day may be in both parts in another style."""
    return drawn(_rewritten, train, test)


def _rewritten(source: random.Random) -> Pair:
    """Return a date in one of the styles, and year, month and day as numbers."""
    day = _FIRST + timedelta(days=source.randrange(_DAYS))
    month = _MONTHS[day.month - 1]
    written = source.choice(_STYLES).format(
        d=day.day, m=day.month, y=day.year, month=month, short=month[:3]
    )
    return Pair(f"{written} = ", day.isoformat())


TASK = GenerationTask("dates", examples, one_right=True)
