"""Records inputs and output gradients of layers in pairs, in a forward and a backward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evatune.capture.example_blocks import ExampleBlock, ExampleCall
from evatune.capture.layer_types import TargetLayer, first_tensor
from evatune.capture.masks import Masks
from evatune.capture.recorder import RowsFunction
from evatune.capture.row_selection import ALL_ROWS, RowSelector
from evatune.capture.shared_inputs import SharedInputs
from evatune.errors import DataError, TargetError
from evatune.modeling.state import full_precision
from evatune.sketch import Examples, ExampleSketch, Sketch, SketchUpdate
from evatune.sketch.base import accumulator_dtype
from evatune.utils.text import shortened

# Bytes of inputs and gradients that go into a sketch at a time, as copies in float32.
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class _SilentCall:
    """A call without a graph, which checkpointing may make again in the backward pass.

    Attributes:
        shape: of the rows by which masks know them. selector: of those that count, which the
            modules around the layer tell in the forward pass alone.
    """

    device: torch.device
    shape: torch.Size | None
    selector: RowSelector


@dataclass
class _Calls:
    """The calls of one layer in a batch.

    Attributes:
        waiting: for a gradient. complete: with one, and not handed on yet.
        silent: those of the forward pass without a graph.
    """

    waiting: list[ExampleCall] = field(default_factory=list)
    complete: list[ExampleCall] = field(default_factory=list)
    silent: list[_SilentCall] = field(default_factory=list)
    recorded: bool = False


class ExampleRecorder:
    """Records every call of a target layer, in the forward and backward passes inside `watching`.

    A call counts once its gradient comes, so once where checkpointed activations are computed
    twice. Calls of one module in one batch are one layer's, and its gradient is their sum. A layer
    to which no gradient comes is recorded as a row without energy.

    Args:
        rows: the caller's own choice among the rows of a layer.
        masks: say which rows count, where `rows` does not.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[TargetLayer],
        shared_inputs: SharedInputs,
        rows: RowsFunction | None,
        masks: Masks,
    ) -> None:
        _require_called(target_layers)
        watched = {target_layer.module for target_layer in target_layers}
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        self._embeddings = [embedding for embedding in embeddings if embedding not in watched]
        self._target_layers = target_layers
        self._shared_inputs = shared_inputs
        self._rows = rows
        self._masks = masks
        self._batch: Any = None
        self._calls: dict[str, _Calls] = {}
        self._backward = False
        self._weight = 1.0
        self._n_examples = 1
        self._lock = threading.Lock()  # the backward pass has a thread for each device

    @contextmanager
    def watching(self, batch: Any, selector: RowSelector) -> Iterator[None]:
        """Keep hooks on the model for one forward and backward pass on `batch`."""
        self._batch = batch
        self._calls = {target_layer.name: _Calls() for target_layer in self._target_layers}
        self._backward = False
        try:
            with ExitStack() as undo:
                if self._rows is None:
                    self._masks.begin(batch, selector)
                    undo.callback(self._masks.begin, None, ALL_ROWS)
                    self._masks.watch(undo)
                # reentrant checkpointing passes over blocks to which nothing with a gradient comes
                for embedding in self._embeddings:
                    undo.callback(embedding.register_forward_hook(_start_graph).remove)
                for target_layer in self._target_layers:
                    self._hook(target_layer, undo)
                yield
            self._record_silent()
        finally:
            self._batch, self._calls = None, {}

    def backward(self, loss: Tensor, *, examples: int, weight: float) -> None:
        """Run the backward pass, in which the gradients are recorded.

        Args:
            loss: () to start from.
            examples: how many there are in the batch.
            weight: that gradients are multiplied by to be those of an example's own loss.
        """
        self._n_examples, self._weight = max(1, examples), weight
        self._backward = True
        loss.backward()  # type: ignore[no-untyped-call]

    # -- hooks -------------------------------------------------------------------------------------

    def _hook(self, target_layer: TargetLayer, undo: ExitStack) -> None:
        """Have a layer's output depend on something with a gradient, and wait for it there."""

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            x = first_tensor(args, kwargs)
            if x is None or not isinstance(output, Tensor):
                return None
            calls = self._calls[target_layer.name]
            if not torch.is_grad_enabled():
                if not self._backward:
                    shape = target_layer.input_view.leading_shape(x)
                    selector = self._selector(target_layer, x, shape)
                    calls.silent.append(_SilentCall(x.device, shape, selector))
                return None
            replaced = _start_graph(module, args, output)
            output = output if replaced is None else replaced
            call = self._call(target_layer, x)
            # what is computed a second time, in the backward pass, may be of the first time's graph
            if not call.again:
                calls.waiting.append(call)
            output.register_hook(lambda gradient: self._arrived(target_layer, call, gradient))
            return replaced

        undo.callback(target_layer.module.register_forward_hook(after, with_kwargs=True).remove)

    def _call(self, target_layer: TargetLayer, x: Tensor) -> ExampleCall:
        """Return a call, with the rows that count, which the masks know while it lasts."""
        target_layer.require_readable(x)
        shape = target_layer.input_view.leading_shape(x)
        again = self._backward
        if self._rows is not None:
            return ExampleCall(x.detach(), self._user_rows(target_layer, x), False, again)
        selector = self._selector(target_layer, x, shape)
        index = None if shape is None else selector.chosen(shape)
        time_first = shape is not None and selector.is_time_first(shape)
        return ExampleCall(x.detach(), index, time_first, again)

    def _selector(
        self, target_layer: TargetLayer, x: Tensor, shape: torch.Size | None
    ) -> RowSelector:
        """Return the selector for the rows of a call.

        A call that checkpointing repeats in the backward pass has the selector that it had before:
        that of the first call with rows of its shape.
        """
        if self._rows is not None:
            return ALL_ROWS
        if self._backward:
            for call in self._calls[target_layer.name].silent:
                if call.shape == shape:
                    return call.selector
        return self._masks.selector(target_layer.name, x, shape)

    def _user_rows(self, target_layer: TargetLayer, x: Tensor) -> Tensor:
        """Return the flat positions that the caller's own function chooses.

        It is handed √1, √2, … as place markers in place of the values, so that a function which
        averages rows is detected.
        """
        assert self._rows is not None
        view, name = target_layer.input_view, target_layer.name
        values = view.all_rows(x)
        leading = values.shape if view.is_tokens else values.shape[:-1]
        count = leading.numel()
        numbers = torch.arange(1, count + 1, dtype=accumulator_dtype(x.device), device=x.device)
        roots = numbers.sqrt()
        probe = roots.reshape(leading)
        if not view.is_tokens:
            probe = probe[..., None].expand(*leading, values.shape[-1])
        chosen = self._rows(probe, self._batch, name)
        flat = chosen if view.is_tokens or not isinstance(chosen, Tensor) else chosen[..., 0]
        if isinstance(flat, Tensor) and flat.ndim == 1 and flat.dtype == roots.dtype:
            index = flat.square().round().long() - 1
            if bool(((index >= 0) & (index < count)).all()) and torch.equal(roots[index], flat):
                return index
        raise DataError(
            f"rows(activation, batch, {name!r}) computes rows of its own, and an objective with"
            " gradients can only leave tokens out, of inputs and gradients alike; return"
            " activation[mask] with a mask of (batch, tokens), or leave rows= out"
        )

    # -- gradients ---------------------------------------------------------------------------------

    def _arrived(self, target_layer: TargetLayer, call: ExampleCall, gradient: Tensor) -> None:
        if not self._backward:
            return  # of a derivative that the loss has a part in
        with self._lock:
            calls = self._calls[target_layer.name]
            call.gradient = gradient.detach()
            calls.complete.append(call)
            if call in calls.waiting:
                calls.waiting.remove(call)
            # of a block that is computed a second time, the calls in other blocks are still to come
            missing = call.again and len(calls.complete) < len(calls.silent)
            if not calls.waiting and not missing:
                self._record(target_layer, calls)

    @torch.no_grad()
    @torch.inference_mode(mode=False)
    def _record(self, target_layer: TargetLayer, calls: _Calls) -> None:
        """Hand on the calls whose gradients have come, as one."""
        complete, calls.complete = calls.complete, []
        calls.recorded = True

        def summarize(sketch: Sketch) -> SketchUpdate:
            assert isinstance(sketch, ExampleSketch)
            return sketch.summarize_examples(self._pieces(target_layer, complete))

        x = complete[0].x
        with full_precision(x.device):
            self._shared_inputs.record(target_layer, x, object(), summarize)

    def _record_silent(self) -> None:
        """Record layers that were called and to which no gradient came."""
        for target_layer in self._target_layers:
            calls = self._calls[target_layer.name]
            if calls.complete:
                self._record(target_layer, calls)
            devices = [call.x.device for call in calls.waiting]
            devices += [call.device for call in calls.silent]
            if calls.recorded or not devices:
                continue
            shape = (1, 1, target_layer.out_features)
            zeros = torch.zeros(shape, dtype=torch.float32, device=devices[0])
            x = zeros.new_zeros(1, 1, target_layer.in_features)
            if target_layer.input_view.is_tokens:
                x = torch.zeros(1, 1, dtype=torch.int64, device=devices[0])
            nothing = ExampleCall(x, None, time_first=False, gradient=zeros)
            self._record(target_layer, _Calls(complete=[nothing]))

    def _pieces(self, target_layer: TargetLayer, calls: list[ExampleCall]) -> Iterator[Examples]:
        """Yield the examples of a layer's calls, of bounded size."""
        view = target_layer.input_view
        blocks = [ExampleBlock.of(view, call, self._n_examples) for call in calls]
        if len({len(block.x) for block in blocks}) == 1:
            blocks = [ExampleBlock.joined(blocks)]
        for block in blocks:
            numbers = target_layer.in_features + target_layer.out_features
            per_example = 4 * numbers * max(1, block.x.shape[1])
            step = max(1, _PIECE_BYTES // per_example)
            yield from block.pieces(step, self._weight)


def _require_called(target_layers: Sequence[TargetLayer]) -> None:
    """Raise a TargetError for layers whose outputs no hook is handed."""
    inside = [target_layer.name for target_layer in target_layers if target_layer.parameter]
    if inside:
        raise TargetError(
            "an objective with gradients needs layers that are called, and these weights are"
            f" multiplied inside other modules: {shortened(inside)}; leave them out of the targets,"
            " or use objective='activations'"
        )


def _start_graph(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Return an output that requires a gradient, for one that does not; else None.

    It is a copy, as the leaf of a graph could not be written to in place.
    """
    if not torch.is_grad_enabled() or not isinstance(output, Tensor) or output.requires_grad:
        return None
    return output.detach().requires_grad_().clone()
