"""Chooses the rows of an activation that count: no padding, no unlabeled tokens, by index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from evatune.choices import IGNORED
from evatune.errors import DataError


def batch_field(batch: Any, key: str) -> Any:
    """Return a named part of a batch, a mapping or a dataclass; None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get(key)
    if is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in fields(batch)]
        return getattr(batch, key) if key in names else None
    return None


def has_token_labels(batch: Any) -> bool:
    """Return whether `labels` has one entry per token, as `attention_mask` or `input_ids` have."""
    labels = batch_field(batch, "labels")
    for key in ("attention_mask", "input_ids"):
        tokens = batch_field(batch, key)
        if isinstance(tokens, Tensor) and tokens.ndim == 2:
            return isinstance(labels, Tensor) and labels.shape == tokens.shape
    return False


def wants_labels(batch: Any, labels_only: bool | str) -> bool:
    """Return whether the labels of this batch choose among its rows."""
    return labels_only is True or (labels_only == "auto" and has_token_labels(batch))


class RowSelector:
    """Chooses the rows that count among those of sequences, by the tokens' positions.

    Attributes:
        tokens: (B, T) bool, true for a token that is no padding; None: all.
        counted: (B, T) bool, true for a position that counts if it is no padding, since its output
            enters the loss, or since the adapter acts there; None: all.
        mask: both together.
        index: which of the B·T positions count; None: all.
    """

    def __init__(self, tokens: Tensor | None = None, counted: Tensor | None = None) -> None:
        self.tokens, self.counted = tokens, counted
        self.mask = tokens if counted is None else counted
        if tokens is not None and counted is not None and tokens.shape == counted.shape:
            self.mask = counted & tokens.to(counted.device)
        self.index: Tensor | None = None
        # The one wait for the device per mask: how many rows there are decides the shapes of all
        # that follows.
        if self.mask is not None and not bool(self.mask.all()):
            self.index = self.mask.flatten().nonzero().flatten()

    @classmethod
    def of_batch(
        cls,
        batch: Any,
        *,
        labels_only: bool | str = False,
        ignore_index: int = IGNORED,
        shift: bool = False,
        active: Tensor | None = None,
    ) -> RowSelector:
        """Return the selector that a batch's own `attention_mask` and `labels` make.

        Args:
            batch: what the model is called with.
            labels_only: keep only tokens that have a loss, besides dropping padding; "auto": if
                tokens have labels at all.
            ignore_index: label of tokens without a loss.
            shift: labels belong to the position before them.
            active: (B, T) bool, the positions at which the adapter acts; None: at all.
        """
        mask, counted = batch_field(batch, "attention_mask"), active
        if wants_labels(batch, labels_only):
            counted = label_mask(batch_field(batch, "labels"), ignore_index, shift)
            if active is not None:
                counted = counted & active.to(counted.device)
        tokens = token_mask(mask) if isinstance(mask, Tensor) else None
        return cls(tokens, counted)

    def narrowed(self, tokens: Tensor) -> RowSelector:
        """Return the selector of another mask (B, T) for the same tokens.

        It is this very one if it chooses the same.
        """
        counted = self.counted
        if counted is not None and counted.shape != tokens.shape:
            counted = None
        other = RowSelector(tokens, counted)
        assert other.mask is not None
        if self.mask is None or self.mask.shape != tokens.shape:
            return other
        if self.mask.device != tokens.device or not torch.equal(self.mask, other.mask):
            return other
        return self

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return an activation (…, d) as (n, d), and the indices of the rows to take (None: all).

        The former is a view where strides allow it.
        """
        index = self.chosen(x.shape[:-1])
        return x.reshape(-1, x.shape[-1]), None if index is None else index.to(x.device)

    def at_positions(self, positions: Tensor, total: int) -> Tensor | None:
        """Return the indices of the rows to take (None: all) among n that were picked before.

        Args:
            positions: (n,), where they stood among `total` rows.
        """
        if self.mask is None or self.chosen(torch.Size([total])) is None:
            return None
        return self.mask.flatten().to(positions.device)[positions].nonzero().flatten()

    def fits(self, shape: torch.Size) -> bool:
        """Return whether an activation with these leading dimensions has a row per position."""
        return self.mask is not None and self._layout(shape) is not None

    def is_time_first(self, shape: torch.Size) -> bool:
        """Return whether an activation with these leading dimensions has time before the batch."""
        return self.mask is not None and self._layout(shape) == "time first"

    def chosen(self, shape: torch.Size) -> Tensor | None:
        """Return the flat indices of the rows to take (None: all) of an activation.

        Args:
            shape: the activation's leading dimensions.
        """
        if self.mask is None or self.index is None:
            return None
        layout = self._layout(shape)
        if layout is None:
            return None
        index = self.index
        if layout == "time first":
            index = self.mask.T.flatten().nonzero().flatten()
        if len(shape) == 1:
            return index
        inner = shape[2:].numel()
        within = torch.arange(inner, dtype=index.dtype, device=index.device)
        return (index[:, None] * inner + within).flatten()

    def _layout(self, shape: torch.Size) -> str | None:
        """Return how sequences lie in an activation.

        None where it is pooled, or of another length.
        """
        assert self.mask is not None
        b, t = self.mask.shape
        if tuple(shape) == (b * t,) or tuple(shape[:2]) == (b, t):
            return "batch first"
        return "time first" if tuple(shape[:2]) == (t, b) else None


ALL_ROWS = RowSelector()


def token_mask(mask: Tensor, *, given_by_user: bool = True) -> Tensor | None:
    """Return (B, T) bool, true where a token is real, from any form of mask that models accept.

    2-D: 1 for real. 3-D (B, Q, T) and 4-D (B, H, Q, T): bool or 1 for "may look at", or additive
    with 0 for "may look at"; a token is real when its own position may look at it. 3-D (B, C, T),
    for C choices of T tokens each: (B·C, T). Additive in two dimensions as well, where a model
    hands it to a module of its own.
    """
    if mask.ndim not in (2, 3, 4):
        return None
    per_token = _per_token(mask)
    if per_token is None:
        return None
    if not per_token.is_floating_point():
        return per_token.bool()
    zero_is_real = mask.ndim > 2 or not given_by_user
    additive = bool((mask < 0).any()) or (zero_is_real and not bool(mask.any()))
    return per_token > -1 if additive else per_token > 0


def _per_token(mask: Tensor) -> Tensor | None:
    """Return the entries of a mask by which each token looks at itself, (B, T)."""
    if mask.ndim == 2:
        return mask
    square = mask[:, 0] if mask.ndim == 4 else mask
    if square.shape[1] == 1:
        return square[:, 0]
    if square.shape[1] == square.shape[2]:
        return square.diagonal(dim1=1, dim2=2)
    if mask.ndim == 4:
        return None  # queries and keys of different lengths: no position looks at itself
    return square.flatten(0, 1)  # choices


def label_mask(labels: Any, ignore_index: int, shift: bool) -> Tensor:
    """Return (B, T) bool, true where the position's output enters the loss."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        given = f"of type {type(labels).__name__}"
        if isinstance(labels, Tensor):
            given = f"of shape {tuple(labels.shape)}"
        elif labels is None:
            given = "absent"
        raise DataError(
            "labels_only needs token labels of shape (batch, tokens) in each batch; labels are"
            f" {given}. Set labels_only=False, or pass rows= to choose rows yourself"
        )
    counted = labels != ignore_index
    if shift:
        counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
    return counted
