"""Rows that come from no token of a mask: images or sounds beside a text, and what is made of them.

Told by the memory of tensors and by their shapes; no value is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evatune.capture.row_selection import RowSelector
from evatune.modeling.batches import tensors_in


class ForeignRows:
    """The tensors of a forward pass whose rows come from no token of the masks."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # kept, so that nothing else comes to lie in their memory

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def __contains__(self, x: Any) -> bool:
        """Return whether `x` is one of them, or lies in the memory of one."""
        if not self._tensors or not isinstance(x, Tensor):
            return False
        address = x.untyped_storage().data_ptr()
        return any(address == other.untyped_storage().data_ptr() for other in self._tensors)

    def add_output(self, output: Any) -> None:
        """Add what a module returned that was given foreign rows."""
        self._tensors += floats_in(output)

    def add_inputs(self, given: Mapping[str, Any], selector: RowSelector) -> None:
        """Add what a model is given beside the tokens of its mask: images, sounds."""
        if selector.mask is None:
            return
        for name, value in given.items():
            if "mask" not in name:
                self._tensors += [x for x in floats_in(value) if not may_hold_tokens(x, selector)]


def may_hold_tokens(x: Tensor, mask: RowSelector) -> bool:
    """Return whether `x` may be the token ids, embedded tokens or features in time of a mask."""
    assert mask.mask is not None
    return x.ndim <= 3 and set(mask.mask.shape) <= set(x.shape)


def may_be_tokens(leading_shape: torch.Size, mask: RowSelector) -> bool:
    """Return whether rows that a mask does not fit may be tokens all the same.

    They are not if they are pooled, or without padding already.
    """
    assert mask.mask is not None
    assert mask.index is not None
    b, count = len(mask.mask), len(mask.index)
    if leading_shape.numel() == count or leading_shape.numel() <= b:
        return False
    return len(leading_shape) == 1 or b in leading_shape[:2]


def floats_in(value: Any) -> list[Tensor]:
    """Return the tensors of floating point numbers in what a module is given or returns."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
