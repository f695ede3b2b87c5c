"""The record of a run: who shares an input, and how each layer ended."""

from __future__ import annotations

import pytest

import evatune
from evatune import CalibrationConfig, Status
from evatune.calibration.build import build_calibration
from evatune.calibration.observer import Observer
from evatune.calibration.options import RunOptions
from evatune.calibration.state import CalibrationState
from tests.calibration.helpers import new_state, step
from tests.helpers import Toy, inputs


def after_a_batch() -> CalibrationState:
    options = RunOptions()
    state = new_state(Toy(), options)
    Observer(state, options).observe(step(inputs()[0]))
    return state


def test_inputs_are_numbered_in_the_order_of_the_layers_and_shared_ones_have_one_spectrum() -> None:
    found = build_calibration(after_a_batch(), Status.DATA_EXHAUSTED, 1)
    assert [layer.input for layer in found.layers.values()] == [0, 0, 0, 1, 2, 3, 3, 3, 4, 5]
    assert found.spectra["blocks.0.q"] is found.spectra["blocks.0.v"]
    assert list(found.spectra) == list(found.status) == list(found.layers)


@pytest.mark.parametrize("ended", [Status.DATA_EXHAUSTED, Status.MAX_BATCHES, Status.CONVERGED])
def test_what_is_wrong_with_a_layer_comes_before_how_the_run_ended(ended: Status) -> None:
    state = after_a_batch()
    q, k, v = (f"blocks.0.{name}" for name in "qkv")
    state.nonfinite.first_seen[q] = (3, 0)
    state.refresher.drifting = {q, k}
    state.convergence.settled = {q, k, v}
    found = build_calibration(state, ended, 1)
    assert (found.status[q], found.layers[q].first_bad_batch) == (Status.NON_FINITE, 3)
    assert found.layers[q].bad_process is None  # there is one
    assert (found.status[k], found.status[v]) == (Status.DRIFTING, Status.CONVERGED)
    rest = Status.UNSETTLED if ended is Status.CONVERGED else ended
    assert {found.status[name] for name in found.status if name not in (q, k, v)} == {rest}


def test_a_layer_that_saw_less_than_it_needs_says_so_in_a_run_that_converged() -> None:
    found = evatune.calibrate(Toy(), [inputs()[0][:1, :1]], CalibrationConfig(rank=4, tolerance=0))
    assert set(found.status.values()) == {Status.TOO_FEW_ROWS}
