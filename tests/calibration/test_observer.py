"""One forward pass, with the inputs of layers recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evatune.calibration.observer import Observer
from evatune.calibration.options import RunOptions
from evatune.calibration.state import CalibrationState
from tests.calibration.helpers import new_state, step
from tests.helpers import Toy, inputs, state_of, tiny_llama, tokens


def rows_of(state: CalibrationState) -> set[int]:
    return {group.sketch.spectrum().rows for group in state.shared_inputs.groups}


def test_the_model_runs_without_gradients_in_evaluation_and_is_then_as_it_was_found() -> None:
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> Any:
        seen.append((model.training, torch.is_grad_enabled()))
        return model(batch)

    model = Toy().train()
    before = state_of(model)
    options = RunOptions(forward=forward)
    Observer(new_state(model, options), options).observe(step(inputs()[0]))
    assert seen == [(False, False)]
    assert state_of(model) == before


def test_a_step_without_a_batch_of_its_own_runs_the_model_and_counts_no_rows() -> None:
    calls: list[Any] = []
    options = RunOptions(forward=lambda model, batch: calls.append(model(batch)))
    state = new_state(Toy(), options)
    observer = Observer(state, options)
    observer.observe(step(inputs()[0]))
    observer.observe(step(inputs()[0], number=2, has_batch=False))
    assert len(calls) == 2
    assert rows_of(state) == {64}


@pytest.mark.parametrize("own_forward", [False, True])
def test_passes_stop_early_after_the_first_but_not_in_a_forward_of_the_callers(
    own_forward: bool,
) -> None:
    model = tiny_llama()
    options = RunOptions(forward=(lambda m, batch: m(**batch)) if own_forward else None)
    observer = Observer(new_state(model, options), options)
    assert not observer.stop_early
    observer.observe(step(tokens()[0]))
    assert observer.stop_early is not own_forward
