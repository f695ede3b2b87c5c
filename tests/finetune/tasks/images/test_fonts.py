"""Fonts."""

from __future__ import annotations

import torch

from evatune.finetune.tasks.images import drawing, fonts

torch.set_num_threads(1)


def test_pre_training_saw_no_font_of_the_task() -> None:
    assert not set(drawing.PRETRAINING_FONTS) & set(fonts.FONTS)
    assert not any(letter.isdigit() for letter in drawing.LETTERS)
