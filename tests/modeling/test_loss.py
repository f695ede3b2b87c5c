"""The loss of a batch, and what a backward pass from it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune.errors import DataError
from tests.losses import GRADIENTS, NAMES, Words, words


def without_labels() -> list[dict[str, Tensor]]:
    return [{"ids": batch["ids"]} for batch in words()]


@pytest.mark.parametrize(
    ("batches", "loss", "says"),
    [
        (without_labels(), None, "needs a loss, and the model returned no loss; give batches with"),
        (words(), lambda m, b: m(**b)["logits"], r"one number, and .* of shape \(3, 6, 5\)"),
        (words(), lambda m, b: 1.0, "loss.model, batch. returned float"),
        (words(), lambda m, b: m(**b)["loss"].detach(), "depends on no target layer"),
        (words(), lambda m, b: b["labels"].sum(), "one number, and .*int64"),
    ],
)
def test_a_loss_that_is_none_is_refused(batches: Any, loss: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        evatune.calibrate(Words(), batches, GRADIENTS, targets=NAMES, loss=loss)


def test_a_head_outside_of_the_model_keeps_the_gradients_it_has() -> None:
    head, other = nn.Linear(5, 5), nn.Linear(5, 1)
    given = head.weight.grad = torch.ones(5, 5)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value: Tensor = other(head(model(**batch)["logits"])).square().mean()
        return value

    found = evatune.calibrate(Words(), words(), GRADIENTS, targets=NAMES, loss=loss)
    assert all(status.usable for status in found.status.values())
    assert head.weight.grad is given
    assert torch.equal(given, torch.ones(5, 5))
    assert head.bias.grad is other.weight.grad is other.bias.grad is None
    assert head.weight.requires_grad
