"""Times of day in words."""

from __future__ import annotations

import re

import torch

from evatune.finetune.tasks.generation import clock

torch.set_num_threads(1)


def test_a_time_in_words_is_the_one_in_digits() -> None:
    said_hours = "twelve one two three four five six seven eight nine ten eleven"
    words = {word: number for number, word in enumerate(said_hours.split())}
    for pair in clock.examples(500, 0).train:
        found = re.search(r"(\d+) (past|to) (\w+) (am|pm|in the \w+)", pair.prompt)
        assert found is not None
        minutes, side, said, half = found.groups()
        hour = words.get(said, int(said) % 12 if said.isdigit() else -1)
        hour += 12 * (half in ("pm", "in the evening"))
        after = 60 * hour + (int(minutes) if side == "past" else -int(minutes))
        assert pair.answer == "{:02d}:{:02d}".format(*divmod(after % 1440, 60))
