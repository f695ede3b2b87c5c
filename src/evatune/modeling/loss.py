"""The loss of a batch: from what a model returns, or by the caller's own function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from evatune.errors import DataError
from evatune.modeling.forward import ForwardFunction

LossFunction = Callable[[nn.Module, Any], Tensor]

# A power of two for the loss, by which gradients do not vanish in float16; it changes no digit of
# others. Whether any is in float16 the forward pass alone may know, as with a Trainer's autocast.
LOSS_SCALE = 1024.0

_WAYS = "give batches with labels, or pass loss=lambda model, batch: … that returns a scalar"


def loss_in(output: Any) -> Any:
    """Return the loss in what a model returned: under its name, first, or alone; None without."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Mapping):
        return output.get("loss")
    return getattr(output, "loss", output)


def loss_of(
    model: nn.Module, batch: Any, call: ForwardFunction, loss: LossFunction | None
) -> Tensor:
    """Return the loss () of a batch, from which a backward pass can start.

    Args:
        call: runs the model, whose output has the loss; not used where there is a function for it.
        loss: the caller's own, or None.

    Raises:
        DataError: there is no loss, it is no scalar, or it depends on no layer.
    """
    value = loss(model, batch) if loss is not None else loss_in(call(model, batch))
    source = "loss(model, batch) returned" if loss is not None else "the model returned"
    if not isinstance(value, Tensor):
        what = "no loss" if value is None else f"{type(value).__name__} where the loss should be"
        raise DataError(f"the objective needs a loss, and {source} {what}; {_WAYS}")
    if value.numel() != 1 or not value.is_floating_point():
        raise DataError(
            f"the objective needs a loss that is one number, and {source} {value.dtype} of shape"
            f" {tuple(value.shape)}; {_WAYS}"
        )
    if not value.requires_grad:
        raise DataError(
            f"the objective needs gradients, and the loss that {source} depends on no target layer"
            " in a way that torch records; look for torch.no_grad(), detach(), item() or reentrant"
            " checkpointing in the model or the loss"
        )
    return value.reshape(())


@contextmanager
def parameters_frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, so that a backward pass computes those of activations.

    Afterwards each requires one as before; none has been given one.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def gradients_kept(loss: Tensor) -> Iterator[None]:
    """Let a backward pass from `loss` leave no `.grad` behind: a head of the caller's has its own.

    Those that are there are as before.
    """
    leaves = _leaves(loss)
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors to which a backward pass from `loss` would give a `.grad`."""
    leaves, seen, nodes = [], set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf.is_leaf:
            leaves.append(leaf)
        nodes += [before for before, _ in node.next_functions]
    return leaves
