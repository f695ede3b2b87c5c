"""One forward and one backward pass, in which layers' inputs and output gradients are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from evatune.calibration.batches import Step
from evatune.calibration.observer import choice_of_rows
from evatune.calibration.options import RunOptions
from evatune.calibration.state import CalibrationState
from evatune.capture import ExampleRecorder, RowSelector, loss_denominator
from evatune.errors import ConfigError
from evatune.modeling.forward import call_model, model_device, to_device
from evatune.modeling.loss import LOSS_SCALE, gradients_kept, loss_of, parameters_frozen
from evatune.modeling.sharding import is_sharded
from evatune.modeling.state import as_base, require_trainable


class LossObserver:
    """Runs the base model and its loss backwards to the activations, and feeds the sketches.

    Gradients are those of an example's own loss, so that neither the size of batches nor their
    order matters: those of a batch's mean are multiplied by what it is the mean over, labels if
    every token has one, else examples. Between passes the model is as it was found: parameters
    require gradients as before, and no hook is left. No `.grad` is touched, of a parameter or of
    whatever else the loss depends on, but for what a reentrant checkpoint in the caller's own
    `loss` hides.
    """

    # The loss is at the end of the model.
    stop_early = False

    def __init__(self, state: CalibrationState, options: RunOptions) -> None:
        model, config = state.model, state.config
        if is_sharded(model):
            raise ConfigError(
                f"objective={config.objective!r} needs a model that is whole on each process; call"
                " evatune before the model is sharded, or use objective='activations'"
            )
        require_trainable(model)
        self._model = model
        self._options = options
        self._call = options.forward or call_model
        self._device = model_device(model)
        self._shared_inputs = state.shared_inputs
        self._selector_of, self._masks = choice_of_rows(state, options)
        self._denominator_of = loss_denominator(model, config.ignore_index, self._call)
        self._recorder = ExampleRecorder(
            model, state.target_layers, state.shared_inputs, options.rows, self._masks
        )

    def observe(self, step: Step) -> None:
        """Run the model and its loss on the batch of a step, forward and backward."""
        batch = step.batch
        if self._options.forward is None:
            batch = to_device(batch, self._device)
        examples = count_examples(batch)
        with as_base(self._model), parameters_frozen(self._model), torch.enable_grad():
            has_rows_function = self._options.rows is not None
            selector = RowSelector() if has_rows_function else self._selector_of(batch)
            labels = None if self._options.loss is not None else self._denominator_of(batch)
            with self._recorder.watching(batch, selector):
                loss = loss_of(self._model, batch, self._call, self._options.loss)
                scaled = loss.float() * LOSS_SCALE
                weight = (examples if labels is None else labels) / LOSS_SCALE
                with gradients_kept(scaled):
                    self._recorder.backward(scaled, examples=examples, weight=weight)
        self._masks.warn_once()
        self._shared_inputs.end_of_forward()


def count_examples(batch: Any) -> int:
    """Return the number of examples in a batch: the length of the first tensor in it, else 1."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in containers of any depth, in their order."""
    if isinstance(batch, Tensor):
        yield batch
        return
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif is_dataclass(batch) and not isinstance(batch, type):
        values = [getattr(batch, field.name) for field in fields(batch)]
    elif isinstance(batch, (tuple, list)):
        values = batch
    for value in values:
        yield from _tensors(value)
