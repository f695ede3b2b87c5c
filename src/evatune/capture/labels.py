"""Tells whether position t predicts label t + 1, by asking the model how it computes its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.row_selection import (
    RowSelector,
    batch_field,
    has_token_labels,
    label_mask,
    wants_labels,
)
from evatune.modeling.batches import map_tensors, tensors_in
from evatune.modeling.loss import loss_in
from evatune.modeling.state import cuda_devices
from evatune.modeling.wrappers import encoder_decoders, output_embedding

Run = Callable[[nn.Module, Any], Any]

# In the words of transformers' `loss_type`: classes whose losses are shifted without a
# `loss_function` that says so.
_SHIFTED = ("CausalLM", "LMHeadModel", "DoubleHeads", "ForConditionalGeneration")


def selector_for(
    model: nn.Module,
    labels_only: bool | str,
    ignore_index: int,
    run: Run | None = None,
    active: Callable[[Any], Tensor] | None = None,
) -> Callable[[Any], RowSelector]:
    """Return the function from a batch of this model to its `RowSelector`.

    Args:
        run: calls the model with a batch, to ask it which positions its loss depends on. None: it
            cannot be asked.
        active: from a batch to the (B, T) positions at which the adapter acts; None: at all.
    """
    if decodes_labels(model):
        labels_only = False  # those are the decoder's, of which `Masks` knows
    shift = LabelShift(model, ignore_index, run)

    def select(batch: Any) -> RowSelector:
        shifted = wants_labels(batch, labels_only) and shift.of(batch)
        return RowSelector.of_batch(
            batch,
            labels_only=labels_only,
            ignore_index=ignore_index,
            shift=shifted,
            active=None if active is None else active(batch),
        )

    return select


def loss_denominator(model: nn.Module, ignore_index: int, run: Run) -> Callable[[Any], int | None]:
    """Return the function from a batch to the number of labels that its loss is the mean over.

    None where a batch has no label per token.
    """
    shift = None if decodes_labels(model) else LabelShift(model, ignore_index, run)

    def count(batch: Any) -> int | None:
        labels = batch_field(batch, "labels")
        if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
            return None
        shifted = shift is not None and has_token_labels(batch) and shift.of(batch)
        return int(label_mask(labels, ignore_index, shifted).sum())

    return count


def decodes_labels(model: nn.Module) -> bool:
    """Return whether labels belong to a decoder with tokens of its own, in an encoder-decoder."""
    return any(True for _ in encoder_decoders(model))


class LabelShift:
    """Knows whether a model's loss compares position t with label t + 1.

    The model is asked at the first batch for which the answer matters: by one forward pass, of one
    example where the batch can be cut, and a backward pass from the loss to the input of the output
    embedding and no further. Where that cannot be run, its `loss_function` decides, and last the
    names of its classes.
    """

    def __init__(self, model: nn.Module, ignore_index: int, run: Run | None) -> None:
        self._model = model
        self._ignore_index = ignore_index
        self._run = run
        self._answer: bool | None = None

    def of(self, batch: Any) -> bool:
        """Return whether labels are shifted; the first batch whose labels can tell decides."""
        if self._answer is None:
            labels = batch_field(batch, "labels")
            plain = label_mask(labels, self._ignore_index, shift=False)
            shifted = label_mask(labels, self._ignore_index, shift=True)
            if torch.equal(plain, shifted):
                return False  # no label at all
            answer = self._ask(batch, plain, shifted)
            self._answer = declares_shift(self._model) if answer is None else answer
        return self._answer

    def _ask(self, batch: Any, plain: Tensor, shifted: Tensor) -> bool | None:
        """Run one example, and else the whole batch; None where neither tells."""
        if self._run is None:
            return None
        index = int((plain != shifted).any(1).nonzero()[0])
        example = one_example(batch, index)
        if example is not None:
            rows = slice(index, index + 1)
            answer = self._compare(example, plain[rows], shifted[rows])
            if answer is not None:
                return answer
        return self._compare(batch, plain, shifted)

    def _compare(self, batch: Any, plain: Tensor, shifted: Tensor) -> bool | None:
        """Return which of two masks the loss fits: False for `plain`, None where both or neither.

        Args:
            plain, shifted: (B, T) bool, the positions in the loss without and with a shift.
        """
        assert self._run is not None
        used = positions_in_loss(self._model, batch, self._run)
        if used is None or used.numel() != plain.numel():
            return None
        used = used.view(plain.shape).to(plain.device)
        # A position whose gradient vanishes in 16 bits is none the less one of the loss.
        fits_plain = not bool((used & ~plain).any())
        fits_shifted = not bool((used & ~shifted).any())
        return None if fits_plain == fits_shifted else fits_shifted


def positions_in_loss(model: nn.Module, batch: Any, run: Run) -> Tensor | None:
    """Return bool, true for each row of the output embedding's input that the loss depends on.

    None where that stays unknown.

    Weights, gradients, modes and random states are left as they are: the one tensor that requires a
    gradient is a copy of that input.
    """
    head = output_embedding(model)
    if head is None:
        return None
    leaves: list[Tensor] = []
    outputs: list[Any] = []

    def detach_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        leaves.append(args[0].detach().clone().requires_grad_())
        # until the end of `no_grad` below: of the layers before, nothing is kept
        torch.set_grad_enabled(True)
        return (leaves[-1], *args[1:])

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(cuda_devices(model)))
        stack.callback(head.register_forward_pre_hook(detach_input).remove)
        stack.callback(model.register_forward_hook(keep_output).remove)
        try:
            # copies, as tensors made in inference mode cannot be kept for a backward pass
            run(model, map_tensors(batch, torch.clone))
            loss = _loss_of(outputs[-1]) if outputs else None
            if loss is None or len(leaves) != 1:
                return None
            (gradient,) = torch.autograd.grad(loss, leaves)
        # whatever a backward pass may lack; an error of the forward pass itself comes again
        except Exception:
            return None
    return (gradient != 0).any(-1)


def one_example(batch: Any, index: int) -> Any:
    """Return one example as a batch of its own.

    None where the tensors of the batch do not all have the examples as their first dimension.
    """
    lengths = {len(tensor) if tensor.ndim else None for tensor in tensors_in(batch)}
    if len(lengths) != 1 or None in lengths:
        return None
    return map_tensors(batch, lambda tensor: tensor[index : index + 1])


def declares_shift(model: nn.Module) -> bool:
    """Return whether the model is said to shift labels.

    Its `loss_function` says so, or else the names of its classes.
    """
    for module in model.modules():
        if getattr(module, "loss_type", None) is not None:
            name = getattr(getattr(module, "loss_function", None), "__name__", "")
            if name.startswith("For"):  # those of transformers
                return bool(name == "ForCausalLMLoss")
    names = [type(module).__name__ for module in model.modules() if hasattr(module, "config")]
    return any(mark in name for name in names for mark in _SHIFTED)


def _loss_of(output: Any) -> Tensor | None:
    """Return the loss in what a model returned, if a backward pass can start from it."""
    loss = loss_in(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    return loss if loss.requires_grad else None
