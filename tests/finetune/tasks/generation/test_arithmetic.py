"""Arithmetic word problems."""

from __future__ import annotations

import torch

from evatune.finetune.tasks.generation import arithmetic

torch.set_num_threads(1)


def test_worked_solutions_are_right() -> None:
    for pair in arithmetic.examples(500, 0).train:
        left, right = pair.answer.split(" = ")
        assert eval(left) == int(right)  # the task's own sums
