"""Records the inputs of layers while the model runs, by forward pre-hooks that always come off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.input_views import Piece
from evatune.capture.layer_types import TargetLayer, first_tensor, sequences_of
from evatune.capture.masks import Masks
from evatune.capture.matmul_tracing import MatmulTracer, TokenPositions, loops_over_experts
from evatune.capture.row_selection import ALL_ROWS, RowSelector
from evatune.capture.shared_inputs import SharedInputs
from evatune.errors import DataError
from evatune.modeling.state import full_precision
from evatune.sketch import InputSketch, Sketch, SketchUpdate

RowsFunction = Callable[[Tensor, Any, str], Tensor]


class StopForward(BaseException):
    """The end of a forward pass in which nothing that is still to come is recorded.

    Not an Exception: a model that catches those must not swallow it.
    """


class InputRecorder:
    """Records the rows of every call of a target layer, in the forward passes inside `watching`.

    They go to `shared_inputs`. While `stop_early` is true, a forward pass that has called every
    target layer once ends there.

    Args:
        rows: the user's own choice of rows; replaces that of `masks`.
        masks: says which rows count. Default: all.
    """

    def __init__(
        self,
        target_layers: Sequence[TargetLayer],
        shared_inputs: SharedInputs,
        rows: RowsFunction | None = None,
        masks: Masks | None = None,
    ) -> None:
        self._target_layers = target_layers
        self._shared_inputs = shared_inputs
        self._rows = rows
        self._masks = masks
        self._batch: Any = None
        self._calls: Counter[str] = Counter()
        self._recording = False
        self.stop_early = False

    @property
    def each_called_once(self) -> bool:
        """True once the latest forward pass has called every target layer, each exactly once."""
        return self._calls.total() == len(self._calls) == len(self._target_layers)

    @contextmanager
    def watching(
        self, batch: Any, selector: RowSelector = ALL_ROWS, *, watch: bool = True
    ) -> Iterator[None]:
        """Keep hooks on the model for one forward pass on `batch`, which counts if `watch` is set.

        Args:
            selector: which rows count as far as the batch itself says.
        """
        self._batch, self._recording = batch, watch
        self._calls.clear()
        with ExitStack() as undo, suppress(StopForward):
            if self._masks is not None and self._rows is None:
                self._masks.begin(batch, selector)
                undo.callback(self._masks.begin, None, ALL_ROWS)
                self._masks.watch(undo)
            self._hook_target_layers(undo)
            yield
        self._batch = None

    def _hook_target_layers(self, undo: ExitStack) -> None:
        by_module: dict[nn.Module, list[TargetLayer]] = {}
        for target_layer in self._target_layers:
            if target_layer.parameter:
                by_module.setdefault(target_layer.module, []).append(target_layer)
            else:
                self._hook_input(target_layer, undo)
        # autocast would keep 16-bit copies of weights from one call to the next, which nobody would
        # recognize
        if by_module:
            undo.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
        for module, target_layers in by_module.items():
            self._hook_products(module, target_layers, undo)
        undo.callback(loops_over_experts(list(by_module)))

    def _hook_input(self, target_layer: TargetLayer, undo: ExitStack) -> None:
        """Record what a layer is called with."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            if x is not None and self._recording:
                rows = x.detach() if x.requires_grad else x
                self._record(target_layer, rows, original=x)
            self._calls[target_layer.name] += 1
            if self.stop_early and self.each_called_once:
                raise StopForward

        # ZeRO-3's own hook hands every layer an alias, by which nobody would know what layers
        # share.
        parameters = target_layer.module.parameters(recurse=False)
        first = any(hasattr(parameter, "ds_id") for parameter in parameters)
        handle = target_layer.module.register_forward_pre_hook(
            hook, with_kwargs=True, prepend=first
        )
        undo.callback(handle.remove)

    def _hook_products(
        self, module: nn.Module, target_layers: list[TargetLayer], undo: ExitStack
    ) -> None:
        """Record what a module multiplies parameters with, from a call's start to its end."""
        by_product = {
            (target_layer.parameter, target_layer.expert): target_layer
            for target_layer in target_layers
        }
        active: list[MatmulTracer] = []

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            as_sequences = sequences_of(module, args, kwargs)

            def on_product(
                parameter: str, expert: int | None, rows: Tensor, positions: TokenPositions | None
            ) -> None:
                target_layer = by_product.get((parameter, expert))
                if target_layer is not None and self._recording:
                    x = as_sequences(rows)
                    self._record(target_layer, x, original=rows, positions=positions)

            parameters = {key: attrgetter(key)(module) for key, _ in by_product}
            active.append(MatmulTracer(parameters, on_product))
            active[-1].__enter__()  # type: ignore[no-untyped-call]

        def end(*_: Any) -> None:
            if active:
                active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        def abandon() -> None:  # torch runs no hook after KeyboardInterrupt and its like
            while active:
                end()

        undo.callback(abandon)
        undo.callback(module.register_forward_pre_hook(start, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(end, always_call=True).remove)

    @torch.no_grad()
    # a sketch made or added to in inference mode could not be changed outside it
    @torch.inference_mode(mode=False)
    def _record(
        self,
        target_layer: TargetLayer,
        x: Tensor,
        original: Tensor,
        positions: TokenPositions | None = None,
    ) -> None:
        """Hand the rows of one call on.

        Args:
            original: the tensor that the model made, by whose identity inputs are shared.
            positions: where the rows stood before an expert was given its own.
        """
        if x.is_inference():
            x = x.clone()
        target_layer.require_readable(x)
        selector, pieces = self._choose(target_layer, x, original, positions)

        def summarize(sketch: Sketch) -> SketchUpdate:
            assert isinstance(sketch, InputSketch)
            return sketch.summarize_pieces(pieces)

        with full_precision(x.device):
            self._shared_inputs.record(target_layer, original, selector, summarize)

    def _choose(
        self,
        target_layer: TargetLayer,
        x: Tensor,
        original: Tensor,
        positions: TokenPositions | None,
    ) -> tuple[RowSelector, Iterator[Piece]]:
        """Return the selector of a call's rows, and the rows that it takes, yet to be read."""
        if self._rows is not None:
            return ALL_ROWS, iter([(self._user_rows(target_layer, x), None)])
        if positions is not None:
            selector = self._selector(target_layer, original, torch.Size([positions[1]]))
            return selector, iter([(x, selector.at_positions(*positions))])
        leading_shape = target_layer.input_view.leading_shape(x)
        selector = self._selector(target_layer, original, leading_shape)
        return selector, target_layer.input_view.pieces(x, selector)

    def _selector(
        self, target_layer: TargetLayer, original: Tensor, leading_shape: torch.Size | None
    ) -> RowSelector:
        if self._masks is None:
            return ALL_ROWS
        return self._masks.selector(target_layer.name, original, leading_shape)

    def _user_rows(self, target_layer: TargetLayer, x: Tensor) -> Tensor:
        """Return the rows that the user's own function chooses."""
        assert self._rows is not None
        view, width = target_layer.input_view, target_layer.in_features
        rows = self._rows(view.all_rows(x), self._batch, target_layer.name)
        if isinstance(rows, Tensor) and view.rows_fit(rows, width):
            return rows.detach()
        returned = type(rows).__name__
        if isinstance(rows, Tensor):
            returned = f"shape {tuple(rows.shape)}"
        raise DataError(
            f"rows(activation, batch, {target_layer.name!r}) returned {returned}; it must return a"
            f" tensor of shape {view.shape_of_rows(width)}"
        )
