"""Sees the rows that a parameter is multiplied with, where no layer of its own is called for it.

`nn.MultiheadAttention` hands its projections' weights to a function, and transformers' mixtures of
experts multiply each expert's slice of a stacked weight with the tokens routed to it. Both end in a
matrix product of torch, and the slice of memory that it reads says whose rows the other factor
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten


# Which arguments of a product are the rows and the weight. In inference mode `linear` and `matmul`
# arrive whole.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.baddbmm.default: (1, 2),
    _ATEN.linear.default: (0, 1),
    _ATEN.matmul.default: (0, 1),
}


# Where rows stood before an expert was given its own: their places (n,), and among how many.
TokenPositions = tuple[Tensor, int]


# parameter, expert (None where there are none), rows (n, d), their places (None: unknown, or as
# they came)
Seen = Callable[[str, int | None, Tensor, TokenPositions | None], None]


class MatmulTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, reports the products with some parameters of a module.

    Args:
        parameters: name → parameter, 2-D (out, in), or 3-D with one slice per expert, either way
            round.
        seen: called with each.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seen: Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = parameters
        self._seen = seen
        # of slices in another dtype → the copy, the slice
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        # memory → the rows picked, and whence
        self._picked: dict[int, tuple[Tensor, TokenPositions]] = {}
        self._order: dict[int, TokenPositions] = {}  # expert → where its latest rows were picked

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS:
            rows, weight = (args[position] for position in _PRODUCTS[func])
            self._product(rows, weight)
        out = func(*args, **(kwargs or {}))
        if func is _ATEN._to_copy.default:  # autocast
            if self._owner(args[0]) is not None:
                self._copies[out.untyped_storage().data_ptr()] = (out, args[0])
            elif args[0].data_ptr() in self._picked:
                self._picked[out.data_ptr()] = (out, self._picked.pop(args[0].data_ptr())[1])
        elif (
            func is _ATEN.index.Tensor
            and len(args[1]) == 1
            and args[1][0].ndim == 1
            and args[0].ndim == 2
        ):
            self._picked[out.data_ptr()] = (out, (args[1][0], len(args[0])))
        return out

    def _owner(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """The parameter whose memory this is a part of."""
        for name, parameter in self._parameters.items():
            if 0 <= weight.data_ptr() - parameter.data_ptr() < parameter.nbytes:
                return name, parameter
        return None

    def _product(self, rows: Tensor, weight: Tensor) -> None:
        copy = self._copies.get(weight.untyped_storage().data_ptr())
        view = weight if copy is None else copy[1]
        owner = self._owner(view)
        if owner is None:
            return
        name, parameter = owner
        if parameter.ndim == 2:
            self._seen(name, None, rows.flatten(0, -2), None)
        # all experts at once, each with all the tokens, of which those of others are zero
        elif weight.ndim == 3:
            for expert, own in enumerate(rows):
                routed = own.any(1).nonzero().flatten()
                self._seen(name, expert, own[routed], (routed, len(own)))
        else:
            expert = (view.data_ptr() - parameter.data_ptr()) // (
                parameter.stride(0) * parameter.element_size()
            )
            self._seen(name, expert, rows.flatten(0, -2), self._places(expert, rows))

    def _places(self, expert: int, rows: Tensor) -> TokenPositions | None:
        """Where an expert's rows were picked, or those of its product before, which they come
        from."""
        _, places = self._picked.pop(rows.data_ptr(), (None, None))
        if places is not None:
            self._order[expert] = places
        known = self._order.get(expert)
        return known if known is not None and len(known[0]) == rows.shape[:-1].numel() else None


def loops_over_experts(modules: list[nn.Module]) -> Callable[[], None]:
    """Let transformers' mixtures of experts multiply one expert at a time, which `MatmulTracer` can
    follow.

    Their other implementations compute the same from copies of the weights. Returns what undoes it.
    """
    configs: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    before = [
        (c, c._experts_implementation) for c in configs if hasattr(c, "_experts_implementation")
    ]
    for config, _ in before:
        config._experts_implementation = "eager"

    def undo() -> None:
        for config, implementation in before:
            config._experts_implementation = implementation

    return undo
