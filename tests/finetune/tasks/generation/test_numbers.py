"""Numbers in words."""

from __future__ import annotations

import pytest
import torch

from evatune.finetune.tasks.generation import numbers

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (206, "two hundred six"),
        (90_000, "ninety thousand"),
        (310_021, "three hundred ten thousand twenty one"),
    ],
)
def test_a_number_in_words(number: int, text: str) -> None:
    assert numbers.words(number) == text
