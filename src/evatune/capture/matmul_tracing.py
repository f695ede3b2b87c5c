"""Traces the rows that a parameter is multiplied with, where no layer is called for it.

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

# The arguments of a product that are the rows and the weight. In inference mode `linear` and
# `matmul` arrive whole.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.baddbmm.default: (1, 2),
    _ATEN.linear.default: (0, 1),
    _ATEN.matmul.default: (0, 1),
}

# Where rows stood before an expert was given its own: their positions (n,), and among how many.
TokenPositions = tuple[Tensor, int]

# parameter, expert (None where there are none), rows (n, d), their positions (None: unknown, or as
# they came)
OnProduct = Callable[[str, int | None, Tensor, TokenPositions | None], None]


class MatmulTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports the products with some parameters of a module, while it is active.

    Args:
        parameters: name → parameter, 2-D (out, in), or 3-D with one slice per expert, either way
            round.
        on_product: called with each.
    """

    def __init__(self, parameters: Mapping[str, Tensor], on_product: OnProduct) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = parameters
        self._on_product = on_product
        # memory of a slice in another dtype → that copy, the slice
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        # memory of rows picked from others → those rows, their positions
        self._picked: dict[int, tuple[Tensor, TokenPositions]] = {}
        # expert → the positions of its latest rows
        self._latest: dict[int, TokenPositions] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS:
            rows, weight = (args[position] for position in _PRODUCTS[func])
            self._trace_product(rows, weight)
        out = func(*args, **(kwargs or {}))
        if func is _ATEN._to_copy.default:  # autocast
            self._trace_copy(args[0], out)
        elif func is _ATEN.index.Tensor:
            self._trace_index(args[0], args[1], out)
        return out

    def _trace_copy(self, source: Tensor, copy: Tensor) -> None:
        """Remember that a weight's slice, or rows that were picked, live on in another dtype."""
        if self._owner(source) is not None:
            self._copies[copy.untyped_storage().data_ptr()] = (copy, source)
        elif source.data_ptr() in self._picked:
            _, positions = self._picked.pop(source.data_ptr())
            self._picked[copy.data_ptr()] = (copy, positions)

    def _trace_index(self, source: Tensor, indices: list[Tensor], picked: Tensor) -> None:
        """Remember which rows of a matrix were picked."""
        if source.ndim == 2 and len(indices) == 1 and indices[0].ndim == 1:
            self._picked[picked.data_ptr()] = (picked, (indices[0], len(source)))

    def _trace_product(self, rows: Tensor, weight: Tensor) -> None:
        copy = self._copies.get(weight.untyped_storage().data_ptr())
        view = weight if copy is None else copy[1]
        owner = self._owner(view)
        if owner is None:
            return
        name, parameter = owner
        if parameter.ndim == 2:
            self._on_product(name, None, rows.flatten(0, -2), None)
        elif weight.ndim == 3:
            self._report_all_experts(name, rows)
        else:
            bytes_per_expert = parameter.stride(0) * parameter.element_size()
            expert = (view.data_ptr() - parameter.data_ptr()) // bytes_per_expert
            positions = self._positions(expert, rows)
            self._on_product(name, expert, rows.flatten(0, -2), positions)

    def _report_all_experts(self, name: str, rows: Tensor) -> None:
        """Report a product of all experts at once.

        Each is given all the tokens, with zeros for those of other experts.
        """
        for expert, tokens in enumerate(rows):
            routed = tokens.any(1).nonzero().flatten()
            self._on_product(name, expert, tokens[routed], (routed, len(tokens)))

    def _owner(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """Return the parameter whose memory this is a part of."""
        for name, parameter in self._parameters.items():
            if 0 <= weight.data_ptr() - parameter.data_ptr() < parameter.nbytes:
                return name, parameter
        return None

    def _positions(self, expert: int, rows: Tensor) -> TokenPositions | None:
        """Return where an expert's rows were picked.

        Rows of its second product come from those of its first, and have the same positions.
        """
        if rows.data_ptr() in self._picked:
            _, self._latest[expert] = self._picked.pop(rows.data_ptr())
        positions = self._latest.get(expert)
        if positions is None or len(positions[0]) != rows.shape[:-1].numel():
            return None
        return positions


def loops_over_experts(modules: list[nn.Module]) -> Callable[[], None]:
    """Let transformers' mixtures of experts multiply one expert at a time, as can be traced.

    Their other implementations compute the same from copies of the weights. Returns what undoes it.
    """
    before: list[tuple[Any, str]] = []
    for module in modules:
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            before.append((config, config._experts_implementation))
    for config, _ in before:
        config._experts_implementation = "eager"

    def undo() -> None:
        for config, implementation in before:
            config._experts_implementation = implementation

    return undo
