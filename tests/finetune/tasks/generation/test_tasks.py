"""The tasks of language generation."""

from __future__ import annotations

import pytest
import torch

from evatune.finetune.tasks.generation import TASKS

torch.set_num_threads(1)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_that_is_tested_was_learned_from(task: str) -> None:
    pairs = TASKS[task].examples(800, 150)
    assert (len(pairs.train), len(pairs.test)) == (800, 150)
    parts = [{pair.prompt or pair.answer for pair in part} for part in (pairs.train, pairs.test)]
    assert not parts[0] & parts[1]
    assert pairs == TASKS[task].examples(800, 150)
