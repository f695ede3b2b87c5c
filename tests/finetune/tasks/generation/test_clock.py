"""Times of day in words."""

from __future__ import annotations

import torch

from evatune.finetune.tasks.generation import clock

torch.set_num_threads(1)


def test_a_time_in_digits_is_the_one_in_words() -> None:
    answers = {pair.prompt: pair.answer for pair in clock.examples(6000, 0).train}
    assert answers["20 to three in the morning = "] == "02:40"
    assert answers["from 7 past three in the evening on = "] == "15:07"
    assert answers["0 past twelve am = "] == "00:00"
    assert answers["at 1 to 12 pm = "] == "11:59"
