"""From an activation to rows: padding and unlabelled tokens are left out, by index and without a
copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from evatune.errors import DataError


def batch_field(batch: Any, key: str) -> Any:
    """A named part of a batch, whether it is a mapping or a dataclass; None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get(key)
    if is_dataclass(batch) and not isinstance(batch, type):
        return next((getattr(batch, f.name) for f in fields(batch) if f.name == key), None)
    return None


def has_token_labels(batch: Any) -> bool:
    """Whether `labels` has one entry per token, by the shape of `attention_mask` or `input_ids`."""
    labels = batch_field(batch, "labels")
    tokens = (batch_field(batch, key) for key in ("attention_mask", "input_ids"))
    shapes = [t.shape for t in tokens if isinstance(t, Tensor) and t.ndim == 2]
    return isinstance(labels, Tensor) and bool(shapes) and labels.shape == shapes[0]


def wants_labels(batch: Any, labels_only: bool | str) -> bool:
    """Whether the labels of this batch choose among its rows."""
    return labels_only is True or (labels_only == "auto" and has_token_labels(batch))


class RowSelector:
    """Chooses the rows that count among those of sequences, by their places.

    Attributes:
        tokens: (B, T) bool, true for a token that is no padding; None: all.
        counted: (B, T) bool, true for a position that counts if it is no padding, since its output
            enters the loss, or since the adapter acts there; None: all.
        mask: both together.
        index: which of the B·T places count; None: all.
    """

    def __init__(self, tokens: Tensor | None = None, counted: Tensor | None = None) -> None:
        self.tokens, self.counted = tokens, counted
        self.mask = tokens if counted is None else counted
        if tokens is not None and counted is not None and tokens.shape == counted.shape:
            self.mask = counted & tokens.to(counted.device)
        # The one wait for the device per mask: how many rows there are decides the shapes of all
        # that follows.
        everything = self.mask is None or bool(self.mask.all())
        self.index = None if everything else self.mask.flatten().nonzero().flatten()  # type: ignore[union-attr]

    @classmethod
    def of_batch(
        cls,
        batch: Any,
        *,
        labels_only: bool | str = False,
        ignore_index: int = -100,
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
            labelled = label_mask(batch_field(batch, "labels"), ignore_index, shift)
            counted = labelled if active is None else labelled & active.to(labelled.device)
        return cls(token_mask(mask) if isinstance(mask, Tensor) else None, counted)

    def narrowed(self, tokens: Tensor) -> RowSelector:
        """Return the selector of another mask (B, T) for the same tokens; this very one if it
        chooses the same."""
        counted = (
            self.counted
            if self.counted is not None and self.counted.shape == tokens.shape
            else None
        )
        other = RowSelector(tokens, counted)
        same = (
            self.mask is not None
            and self.mask.shape == tokens.shape
            and self.mask.device == tokens.device
        )
        return self if same and torch.equal(self.mask, other.mask) else other  # type: ignore[arg-type]

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, d) view of an activation (…, d) where strides allow it, and which rows to take (None:
        all)."""
        index = self.chosen(x.shape[:-1])
        return x.reshape(-1, x.shape[-1]), None if index is None else index.to(x.device)

    def at_positions(self, places: Tensor, total: int) -> Tensor | None:
        """Which of n rows to take (None: all) that stood at `places` (n,) among `total` rows."""
        if self.mask is None or self.chosen(torch.Size([total])) is None:
            return None
        return self.mask.flatten().to(places.device)[places].nonzero().flatten()

    def fits(self, shape: torch.Size) -> bool:
        """Whether an activation with these leading dimensions has a row for each place."""
        return self.mask is not None and self._layout(shape) is not None

    def chosen(self, shape: torch.Size) -> Tensor | None:
        """Which of the rows of an activation with these leading dimensions to take, counted flat
        (None: all)."""
        if self.mask is None or self.index is None:
            return None
        layout = self._layout(shape)
        if layout is None:
            return None
        index = self.index if layout == "batch first" else self.mask.T.flatten().nonzero().flatten()
        if len(shape) == 1:
            return index
        inner = shape[2:].numel()
        within = torch.arange(inner, dtype=index.dtype, device=index.device)
        return (index[:, None] * inner + within).flatten()

    def _layout(self, shape: torch.Size) -> str | None:
        """How sequences lie in an activation; None where it is pooled, or of a length of its
        own."""
        assert self.mask is not None
        b, t = self.mask.shape
        if tuple(shape) == (b * t,) or tuple(shape[:2]) == (b, t):
            return "batch first"
        return "time first" if tuple(shape[:2]) == (t, b) else None


ALL_ROWS = RowSelector()


def token_mask(mask: Tensor, *, given_by_user: bool = True) -> Tensor | None:
    """(B, T) bool, true where a token is real, from any of the forms that transformers' models
    accept.

    2-D: 1 for real. 3-D (B, Q, T) and 4-D (B, H, Q, T): bool or 1 for "may look at", or additive
    with 0 for "may look at"; a token is real when its own position may look at it. 3-D (B, C, T),
    for C choices of T tokens each: (B·C, T). Additive in two dimensions as well, where a model
    hands it to a module of its own.
    """
    if mask.ndim not in (2, 3, 4):
        return None
    choices = mask.ndim == 3
    own = mask[:, 0] if mask.ndim == 4 else mask
    if own.ndim == 3 and own.shape[1] == 1:
        own = own[:, 0]
    elif own.ndim == 3 and own.shape[1] == own.shape[2]:
        own = own.diagonal(dim1=1, dim2=2)
    elif own.ndim == 3:
        if not choices:
            return None  # queries and keys of different lengths: no position looks at itself
        own = own.flatten(0, 1)
    if not own.is_floating_point():
        return own.bool()
    zero_is_real = mask.ndim > 2 or not given_by_user
    additive = bool((mask < 0).any()) or (zero_is_real and not bool(mask.any()))
    return own > -1 if additive else own > 0


def label_mask(labels: Any, ignore_index: int, shift: bool) -> Tensor:
    """(B, T) bool, true where the position's output enters the loss."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        shape = (
            f"of shape {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else f"of type {type(labels).__name__}"
        )
        shape = "absent" if labels is None else shape
        raise DataError(
            "labels_only needs token labels of shape (batch, tokens) in each batch; labels are"
            f" {shape}. Set labels_only=False, or pass rows= to choose rows yourself"
        )
    kept = labels != ignore_index
    if shift:
        kept = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)
    return kept
