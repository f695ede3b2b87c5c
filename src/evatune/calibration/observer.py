"""One forward pass: run the model on a batch while its layers' inputs are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from evatune.calibration.batches import Step
from evatune.calibration.options import RunOptions
from evatune.calibration.state import CalibrationState
from evatune.capture import InputRecorder, Masks, RowSelector, selector_for
from evatune.modeling.forward import call_model, model_device, to_device
from evatune.modeling.sharding import is_sharded
from evatune.modeling.state import as_base, may_stop_early


def choice_of_rows(
    state: CalibrationState, options: RunOptions
) -> tuple[Callable[[Any], RowSelector], Masks]:
    """Return what says which rows count: by a batch itself, and by the masks in the model."""
    model, config = state.model, state.config
    labels_only = config.labels_only or False
    call = None if is_sharded(model) else options.forward or call_model
    selector_of = selector_for(model, labels_only, config.ignore_index, call, options.active)
    masks = Masks(
        model,
        state.target_layers,
        labels_only=labels_only is True,
        ignore_index=config.ignore_index,
    )
    return selector_of, masks


class Observer:
    """Runs the model as the base model, without gradients, and feeds the sketches.

    Between forward passes, when others run, the data among them, the model is as it was found,
    without a hook.
    """

    def __init__(self, state: CalibrationState, options: RunOptions) -> None:
        model = state.model
        self._model = model
        self._options = options
        self._call = options.forward or call_model
        self._device = model_device(model)
        self._shared_inputs = state.shared_inputs
        self._selector_of, self._masks = choice_of_rows(state, options)
        self._recorder = InputRecorder(
            state.target_layers, state.shared_inputs, options.rows, self._masks
        )
        self._may_stop_early = options.forward is None and may_stop_early(model)

    @property
    def stop_early(self) -> bool:
        """True if forward passes end once every watched layer has run."""
        return self._recorder.stop_early

    @stop_early.setter
    def stop_early(self, value: bool) -> None:
        self._recorder.stop_early = value

    def observe(self, step: Step) -> None:
        """Run the model on the batch of a step; its rows count if the step has one of its own."""
        batch = step.batch
        if self._options.forward is None:
            batch = to_device(batch, self._device)
        with as_base(self._model), torch.no_grad():
            has_rows_function = self._options.rows is not None
            selector = RowSelector() if has_rows_function else self._selector_of(batch)
            with self._recorder.watching(batch, selector, watch=step.has_batch):
                self._call(self._model, batch)
        self._masks.warn_once()
        if step.number == 1 and self._may_stop_early and self._recorder.each_called_once:
            self._recorder.stop_early = True
        self._shared_inputs.end_of_forward()
