"""From an activation to rows: padding and unlabelled tokens are left out, by index and without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evatune.errors import DataError


def batch_field(batch: Any, key: str) -> Any:
    """A named part of a batch, whether it is a mapping or a dataclass; None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get(key)
    if is_dataclass(batch) and not isinstance(batch, type):
        return next((getattr(batch, f.name) for f in fields(batch) if f.name == key), None)
    return None


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t predicts label t + 1: causal language models, by their class name."""
    names = [type(m).__name__ for m in model.modules() if hasattr(m, "config")]
    return any("CausalLM" in name or "LMHeadModel" in name or "DoubleHeads" in name for name in names)


def decodes_labels(model: nn.Module) -> bool:
    """Whether labels belong to a decoder that has tokens of its own: encoder-decoder models."""
    return any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) is True for m in model.modules())


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of an encoder-decoder model, which is called with masks of its own; None for any other model."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) is True and hasattr(module, "get_decoder"):
            found = module.get_decoder()  # type: ignore[operator]
            return found if isinstance(found, nn.Module) else None
    return None


def has_token_labels(batch: Any) -> bool:
    """Whether `labels` has one entry per token, by the shape of `attention_mask` or `input_ids`."""
    labels = batch_field(batch, "labels")
    tokens = (batch_field(batch, key) for key in ("attention_mask", "input_ids"))
    shapes = [t.shape for t in tokens if isinstance(t, Tensor) and t.ndim == 2]
    return isinstance(labels, Tensor) and bool(shapes) and labels.shape == shapes[0]


@contextmanager
def full_precision(device: torch.device | None) -> Iterator[None]:
    """Without autocast, under which products on `device` would be in 16 bits: what is ours is in float32 or better."""
    kinds = {"cpu", "cpu" if device is None else device.type}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class RowSelector:
    """Chooses the rows of one batch. Built once per batch, asked once per activation.

    Args:
        batch: what the model is called with.
        labels_only: keep only tokens that have a loss, besides dropping padding; "auto": if tokens have labels at all.
        ignore_index: label of tokens without a loss.
        shift: labels belong to the position before them (causal language models).
        active: (B, T) bool, the positions at which the adapter acts; None: at all.
    """

    def __init__(
        self,
        batch: Any,
        *,
        labels_only: bool | str = False,
        ignore_index: int = -100,
        shift: bool = False,
        active: Tensor | None = None,
    ) -> None:
        mask = batch_field(batch, "attention_mask")
        self.mask = token_mask(mask) if isinstance(mask, Tensor) else None  # (B, T) bool
        if labels_only is True or (labels_only == "auto" and has_token_labels(batch)):
            labelled = label_mask(batch_field(batch, "labels"), ignore_index, shift)
            if self.mask is not None and self.mask.shape == labelled.shape:
                labelled = labelled & self.mask.to(labelled.device)
            self.mask = labelled
        if active is not None:
            self.mask = active if self.mask is None else active & self.mask.to(active.device)
        # The one wait for the device per batch: how many rows there are decides the shapes of all that follows.
        self.index = None if self.mask is None or bool(self.mask.all()) else self.mask.flatten().nonzero().flatten()

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, d) view of an activation (…, d) where strides allow it, and which rows to take (None: all)."""
        index = self.chosen(x.shape[:-1])
        return x.reshape(-1, x.shape[-1]), None if index is None else index.to(x.device)

    def of_places(self, places: Tensor, total: int) -> Tensor | None:
        """Which of n rows to take (None: all) that stood at `places` (n,) among `total` rows."""
        if self.mask is None or self.chosen(torch.Size([total])) is None:
            return None
        return self.mask.flatten().to(places.device)[places].nonzero().flatten()

    def chosen(self, shape: torch.Size) -> Tensor | None:
        """Which of the rows of an activation with these leading dimensions to take, counted flat (None: all)."""
        if self.mask is None or self.index is None:
            return None
        b, t = self.mask.shape
        if tuple(shape) == (b * t,):
            return self.index
        if tuple(shape[:2]) != (b, t):
            return None  # pooled, or of a length of its own: the mask does not speak about these rows
        inner = shape[2:].numel()
        return (self.index[:, None] * inner + torch.arange(inner, device=self.index.device)).flatten()


class DecoderRows:
    """Chooses rows while the decoder of an encoder-decoder model runs, where two sequences meet.

    The decoder's own tokens count as the `attention_mask` that it is called with says, else where `labels` have a loss
    (in training a position without one is padding), else all. The encoder's output, handed to it as
    `encoder_hidden_states` and from there to the keys and values of cross-attention, is recognised by identity and goes
    by the `encoder_attention_mask`.

    Args:
        batch: what the model is called with. call: the keywords that the decoder is called with.
        labels_only: go by the labels even where there is a mask. ignore_index: label of tokens without a loss.
    """

    def __init__(self, batch: Any, call: Mapping[str, Any], *, labels_only: bool, ignore_index: int) -> None:
        self._encoded = call.get("encoder_hidden_states")
        mask, labels = call.get("attention_mask"), batch_field(batch, "labels")
        use_labels = (labels_only or mask is None) and isinstance(labels, Tensor) and labels.ndim == 2
        own = {"attention_mask": mask, "labels": labels}
        self._own = RowSelector(own, labels_only=use_labels, ignore_index=ignore_index)
        self._others = RowSelector({"attention_mask": call.get("encoder_attention_mask")})

    def selector(self, x: Tensor) -> RowSelector:
        """Whose rows `x` holds."""
        return self._others if x is self._encoded else self._own


def selector_for(
    model: nn.Module,
    labels_only: bool | str,
    ignore_index: int,
    active: Callable[[Any], Tensor] | None = None,
) -> Callable[[Any], RowSelector]:
    """A function from a batch to its `RowSelector`, with what depends on the model settled.

    Args:
        active: from a batch to the positions at which the adapter acts; None: at all.
    """
    if decodes_labels(model):
        labels_only = False  # of them `DecoderRows` knows
    shift = bool(labels_only) and shifts_labels(model)

    def select(batch: Any) -> RowSelector:
        return RowSelector(
            batch,
            labels_only=labels_only,
            ignore_index=ignore_index,
            shift=shift,
            active=None if active is None else active(batch),
        )

    return select


def token_mask(mask: Tensor) -> Tensor | None:
    """(B, T) bool, true where a token is real, from any of the forms that transformers' models accept.

    2-D: 1 for real. 3-D (B, Q, T) and 4-D (B, H, Q, T): bool or 1 for "may look at", or additive with 0
    for "may look at"; a token is real when its own position may look at it.
    """
    if mask.ndim == 2:
        return mask > 0 if mask.is_floating_point() else mask.bool()
    if mask.ndim not in (3, 4):
        return None
    if mask.ndim == 4:
        mask = mask[:, 0]
    own = mask[:, 0] if mask.shape[1] == 1 else None
    if own is None:
        if mask.shape[1] != mask.shape[2]:
            return None  # queries and keys of different lengths: no position looks at itself
        own = mask.diagonal(dim1=1, dim2=2)
    if own.is_floating_point():
        additive = bool((mask < 0).any()) or not bool(mask.any())
        return own > -1 if additive else own > 0
    return own.bool()


def label_mask(labels: Any, ignore_index: int, shift: bool) -> Tensor:
    """(B, T) bool, true where the position's output enters the loss."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        shape = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else "absent"
        raise DataError(
            f"labels_only needs token labels of shape (batch, tokens) in each batch; labels are {shape}. Set "
            "labels_only=False, or pass rows= to choose rows yourself"
        )
    kept = labels != ignore_index
    if shift:
        kept = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)
    return kept
