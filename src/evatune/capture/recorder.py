"""Watches the inputs of layers while the model runs: forward pre-hooks that always come off
again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.layer_types import OneHotRows, Piece, TargetLayer, sequences_of
from evatune.capture.masks import Masks
from evatune.capture.matmul_tracing import MatmulTracer, TokenPositions, loops_over_experts
from evatune.capture.row_selection import ALL_ROWS, RowSelector
from evatune.capture.shared_inputs import SharedInputs
from evatune.errors import DataError, TargetError
from evatune.modeling.state import full_precision

RowsFunction = Callable[[Tensor, Any, str], Tensor]


class StopForward(BaseException):
    """Ends a forward pass of which nothing that is still to come is watched.

    Not an Exception: a model that catches those must not swallow it.
    """


class InputRecorder:
    """Offers to `sharing` the rows of every call of a site, during the forward passes inside
    `watching` alone.

    While `stop_early` is true, a forward pass that has called every site once ends there.

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
        self._watching = False
        self.stop_early = False

    @property
    def each_called_once(self) -> bool:
        """Whether the latest forward pass called every site exactly once, and all of it is known by
        now."""
        return self._calls.total() == len(self._calls) == len(self._target_layers)

    @contextmanager
    def watching(
        self, batch: Any, selector: RowSelector = ALL_ROWS, *, watch: bool = True
    ) -> Iterator[None]:
        """Hooks are on the model inside, for one forward pass on `batch`, which counts if `watch`
        says so.

        Args:
            selector: which rows count as far as the batch itself says.
        """
        self._batch, self._watching = batch, watch
        self._calls.clear()
        with ExitStack() as undo, suppress(StopForward):
            if self._masks is not None and self._rows is None:
                self._masks.begin(batch, selector)
                undo.callback(self._masks.begin, None, ALL_ROWS)
                self._masks.watch(undo)
            self._watch_sites(undo)
            yield
        self._batch = None

    def _watch_sites(self, undo: ExitStack) -> None:
        held: dict[nn.Module, list[TargetLayer]] = {}
        for target_layer in self._target_layers:
            if target_layer.parameter:
                held.setdefault(target_layer.module, []).append(target_layer)
            else:
                # ZeRO-3's own hook hands every layer an alias, by which nobody would know what
                # layers share.
                first = any(
                    hasattr(parameter, "ds_id")
                    for parameter in target_layer.module.parameters(recurse=False)
                )
                hook = target_layer.module.register_forward_pre_hook(
                    self._hook_for(target_layer), with_kwargs=True, prepend=first
                )
                undo.callback(hook.remove)
        # autocast would keep 16-bit copies of weights from one call to the next, which nobody would
        # recognise
        if held:
            undo.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
        for module, target_layers in held.items():
            self._watch_products(module, target_layers, undo)
        undo.callback(loops_over_experts(list(held)))

    def _hook_for(
        self, target_layer: TargetLayer
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(
                (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None
            )
            if x is not None and self._watching:
                self._take(target_layer, x.detach() if x.requires_grad else x, original=x)
            self._calls[target_layer.name] += 1
            if self.stop_early and self.each_called_once:
                raise StopForward

        return hook

    def _watch_products(
        self, module: nn.Module, target_layers: list[TargetLayer], undo: ExitStack
    ) -> None:
        """Watch what a module multiplies parameters with, from each of its calls' start to its
        end."""
        by_product = {
            (target_layer.parameter, target_layer.expert): target_layer
            for target_layer in target_layers
        }
        active: list[MatmulTracer] = []

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sequences = sequences_of(module, args, kwargs)

            def seen(
                parameter: str, expert: int | None, rows: Tensor, places: TokenPositions | None
            ) -> None:
                target_layer = by_product.get((parameter, expert))
                if target_layer is not None and self._watching:
                    self._take(target_layer, sequences(rows), original=rows, places=places)

            parameters = {key: attrgetter(key)(module) for key, _ in by_product}
            active.append(MatmulTracer(parameters, seen))
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
    def _take(
        self,
        target_layer: TargetLayer,
        x: Tensor,
        original: Tensor,
        places: TokenPositions | None = None,
    ) -> None:
        x = x.clone() if x.is_inference() else x
        if isinstance(target_layer.input_view, OneHotRows) and (
            x.is_floating_point() or x.dtype == torch.bool
        ):
            raise TargetError(
                f"{target_layer.name} is an embedding ({type(target_layer.module).__name__}) that"
                f" is called with {x.dtype} numbers and not with token ids; leave it out of the"
                " targets, or with exclude_modules in the LoraConfig"
            )
        pieces: Callable[[], Iterator[Piece]]
        chooser = ALL_ROWS
        if self._rows is not None:
            chosen = self._chosen(target_layer, x)
            pieces = lambda: iter([(chosen, None)])  # noqa: E731
        else:
            leading = (
                target_layer.input_view.places(x) if places is None else torch.Size([places[1]])
            )
            if self._masks is not None:
                chooser = self._masks.selector(target_layer.name, original, leading)
            if places is not None:
                index = chooser.at_positions(*places)
                pieces = lambda: iter([(x, index)])  # noqa: E731
            else:
                pieces = partial(target_layer.input_view.pieces, x, chooser)
        with full_precision(x.device):
            self._shared_inputs.record(
                target_layer, original, chooser, lambda sketch: sketch.summarize_pieces(pieces())
            )

    def _chosen(self, target_layer: TargetLayer, x: Tensor) -> Tensor:
        assert self._rows is not None
        input_view = target_layer.input_view
        rows = self._rows(input_view.whole(x), self._batch, target_layer.name)
        shape = (
            "(rows,)"
            if isinstance(input_view, OneHotRows)
            else f"(rows, {target_layer.in_features})"
        )
        fits = isinstance(rows, Tensor) and (
            rows.ndim == 1
            if isinstance(input_view, OneHotRows)
            else rows.ndim == 2 and rows.shape[1] == target_layer.in_features
        )
        if not fits:
            got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise DataError(
                f"rows(activation, batch, {target_layer.name!r}) returned {got}; it must return a"
                f" tensor of shape {shape}"
            )
        return rows.detach()
