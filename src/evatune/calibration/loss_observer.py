"""One forward and one backward pass, in which layers' inputs and output gradients are recorded."""

from __future__ import annotations

from typing import Any

import torch

from evatune.calibration.batches import Step
from evatune.calibration.observer import BatchObserver
from evatune.calibration.options import RunOptions
from evatune.calibration.state import CalibrationState
from evatune.capture import ExampleRecorder, loss_denominator
from evatune.errors import ConfigError
from evatune.modeling.batches import tensors_in
from evatune.modeling.loss import LOSS_SCALE, gradients_kept, loss_of, parameters_frozen
from evatune.modeling.sharding import is_sharded
from evatune.modeling.state import require_trainable


class LossObserver(BatchObserver):
    """Runs the model and its loss backwards to the activations, and records examples of both.

    Gradients are those of an example's own loss, so that neither the size of batches nor their
    order matters: those of a batch's mean are multiplied by what it is the mean over, labels if
    every token has one, else examples. Between passes parameters require gradients as before. No
    `.grad` is touched, of a parameter or of whatever else the loss depends on, but for what a
    reentrant checkpoint in the caller's own `loss` hides. The loss is at the end of the model, so
    that no pass ends early.
    """

    def __init__(self, state: CalibrationState, options: RunOptions) -> None:
        model, config = state.model, state.config
        if is_sharded(model):
            raise ConfigError(
                f"objective={config.objective!r} needs a model that is whole on each process; call"
                " evatune before the model is sharded, or use objective='activations'"
            )
        require_trainable(model)
        super().__init__(state, options)
        self._denominator_of = loss_denominator(model, config.ignore_index, self._call)
        self._recorder = ExampleRecorder(
            model, state.target_layers, state.shared_inputs, options.rows, self._masks
        )

    def _run(self, step: Step, batch: Any) -> None:
        """Run the model and its loss, forward and backward."""
        examples = count_examples(batch)
        with parameters_frozen(self._model), torch.enable_grad():
            selector = self._selector(batch)
            labels = None if self._options.loss is not None else self._denominator_of(batch)
            with self._recorder.watching(batch, selector):
                loss = loss_of(self._model, batch, self._call, self._options.loss)
                scaled = loss.float() * LOSS_SCALE
                weight = (examples if labels is None else labels) / LOSS_SCALE
                with gradients_kept(scaled):
                    self._recorder.backward(scaled, examples=examples, weight=weight)


def count_examples(batch: Any) -> int:
    """Return the number of examples in a batch: the length of the first tensor in it, else 1."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)
