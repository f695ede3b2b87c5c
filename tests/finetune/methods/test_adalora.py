"""AdaLoRA."""

from __future__ import annotations

import torch

from tests.finetune.helpers import MethodCase

torch.set_num_threads(1)


def test_the_penalty_of_adalora_is_in_the_loss_of_training_and_not_of_evaluation() -> None:
    case = MethodCase("llama")
    model, batch = case.adapted("adalora"), case.batches[0]
    with torch.no_grad():
        plain = case.model()(**batch).loss
        assert torch.allclose(model.eval()(**batch).loss, plain)
        assert model.train()(**batch).loss > plain + 0.1
