"""Questions about things."""

from __future__ import annotations

import torch

from evatune.finetune.tasks.generation import commonsense

torch.set_num_threads(1)


def test_a_question_has_its_answer_among_four_different_choices() -> None:
    for pair in commonsense.examples(1000, 200).test:
        assert len(set(pair.choices)) == 4
        assert pair.answer in pair.choices
