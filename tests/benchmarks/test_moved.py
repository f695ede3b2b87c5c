"""What is left of a start in what was learned."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

A, B = "model.layer.lora_A.weight", "model.layer.lora_B.weight"


def test_what_is_learned_in_the_rows_of_the_start_is_told_from_what_is_not(
    moved: ModuleType,
) -> None:
    start = {A: torch.tensor([[2.0, 0.0, 0.0, 0.0]]), B: torch.zeros(3, 1)}
    b = torch.tensor([[1.0], [2.0], [0.0]])
    for row, share in (([5.0, 0, 0, 0], 1.0), ([0, 1.0, 0, 0], 0.0), ([1.0, 1.0, 0, 0], 0.5)):
        end = {A: torch.tensor([row]), B: b}
        assert moved.share_in_start(start, end) == pytest.approx((share, 0.25))
