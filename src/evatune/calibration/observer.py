"""One pass over a batch: what all have in common, and the forward pass that records inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from evatune.calibration.batches import Step
from evatune.calibration.options import RunOptions
from evatune.calibration.state import CalibrationState
from evatune.capture import InputRecorder, Masks, RowSelector, selector_for
from evatune.errors import EvatuneError
from evatune.modeling.forward import call_model, model_device, to_device
from evatune.modeling.sharding import is_sharded
from evatune.modeling.state import as_base, may_stop_early


class BatchObserver(ABC):
    """Runs the base model on batches, and feeds the sketches with what the layers see.

    Between the passes, when others run, the data among them, the model is as it was found, without
    a hook.

    Attributes:
        stop_early: passes end once every watched layer has run.
    """

    def __init__(self, state: CalibrationState, options: RunOptions) -> None:
        model, config = state.model, state.config
        self.stop_early = False
        self._model = model
        self._options = options
        self._call = options.forward or call_model
        self._device = model_device(model)
        self._shared_inputs = state.shared_inputs
        labels_only = config.labels_only or False
        self._selector_of = selector_for(
            model,
            labels_only,
            config.ignore_index,
            None if is_sharded(model) else self._call,
            options.active,
        )
        self._masks = Masks(
            model,
            state.target_layers,
            labels_only=labels_only is True,
            ignore_index=config.ignore_index,
        )

    def observe(self, step: Step) -> None:
        """Run the model on the batch of a step."""
        batch = step.batch
        if self._options.forward is None:
            batch = to_device(batch, self._device)
        try:
            with as_base(self._model):
                self._run(step, batch)
        except EvatuneError:
            raise
        except Exception as error:
            error.add_note(f"in batch {step.batch_number} of the calibration")
            raise
        self._masks.warn_once()
        self._shared_inputs.end_of_forward()

    @abstractmethod
    def _run(self, step: Step, batch: Any) -> None:
        """Run the base model on a batch that is on its device, and record what the layers see."""

    def _selector(self, batch: Any) -> RowSelector:
        """Return which rows count as far as the batch itself says."""
        return RowSelector() if self._options.rows is not None else self._selector_of(batch)


class Observer(BatchObserver):
    """Runs the model without gradients, and records inputs."""

    def __init__(self, state: CalibrationState, options: RunOptions) -> None:
        super().__init__(state, options)
        self._recorder = InputRecorder(
            state.target_layers, state.shared_inputs, options.rows, self._masks
        )
        self._may_stop_early = options.forward is None and may_stop_early(state.model)

    def _run(self, step: Step, batch: Any) -> None:
        """Run the model; rows count if the step has a batch of its own."""
        self._recorder.stop_early = self.stop_early
        with (
            torch.no_grad(),
            self._recorder.watching(batch, self._selector(batch), watch=step.has_batch),
        ):
            self._call(self._model, batch)
        if step.number == 1 and self._may_stop_early and self._recorder.each_called_once:
            self.stop_early = True
