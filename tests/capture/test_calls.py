"""Arguments of calls, by the names that a module has for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.calls import Signature, inputs_of, tensor_argument
from tests.helpers import tiny_bert


class Attention(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, *, scale: float = 1) -> None:
        pass


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_masks_may_come_by_name_among_any_keywords_or_to_a_whole_model() -> None:
    assert Signature.of(Attention()) == Signature(("x", "attention_mask"), is_model=False)
    assert Signature.of(Attention()).takes_masks
    assert Signature.of(Anything()).takes_masks
    assert Signature.of(tiny_bert()).is_model
    assert not Signature.of(nn.Linear(2, 2)).takes_masks


def test_arguments_are_named_in_the_order_of_the_signature() -> None:
    signature = Signature.of(Attention())
    assert list(signature.arguments((1,), {"scale": 2, "attention_mask": 3}).items()) == [
        ("x", 1),
        ("attention_mask", 3),
        ("scale", 2),
    ]
    assert Signature.of(Anything()).arguments((1, 2), {"a": 3}) == {"0": 1, "1": 2, "a": 3}


def test_inputs_are_the_tensors_that_are_no_masks() -> None:
    x, mask = torch.zeros(2), torch.ones(2)
    given = {"x": x, "attention_mask": mask, "use_cache": True, "y": mask}
    assert [id(tensor) for tensor in inputs_of(given)] == [id(x), id(mask)]
    assert tensor_argument(given, "attention_mask") is mask
    assert tensor_argument(given, "use_cache") is None
