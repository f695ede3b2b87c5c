"""Dates in several styles."""

from __future__ import annotations

import torch

from evatune.finetune.tasks.generation import dates

torch.set_num_threads(1)


def test_all_styles_say_the_same_day() -> None:
    pairs = dates.examples(500, 0).train
    styles = set()
    for pair in pairs:
        year, month, day = map(int, pair.answer.split("-"))
        name = dates._MONTHS[month - 1]
        written = [
            style.format(d=day, m=month, y=year, month=name, short=name[:3])
            for style in dates._STYLES
        ]
        styles.add(written.index(pair.prompt.removesuffix(" = ")))
    assert len(styles) == len(dates._STYLES)
