"""NaN and Inf in what layers are given."""

from __future__ import annotations

import torch
from torch import nn

from evatune.calibration.nonfinite import NonFiniteWatch
from evatune.capture import SharedInputs, TargetLayer, find_target_layers
from evatune.distributed.group import ProcessGroup
from evatune.sketch import Sketch, SketchSettings, make_sketch
from tests.helpers import every_outcome

torch.set_num_threads(1)


def new_sketch(target_layer: TargetLayer, device: torch.device) -> Sketch:
    return make_sketch("exact", SketchSettings(target_layer.in_features, 2, device=device))


def watched() -> tuple[NonFiniteWatch, SharedInputs, list[TargetLayer]]:
    """A watch over two layers, "0" and "1", that have been given nothing."""
    layers = find_target_layers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), None)
    shared_inputs = SharedInputs(new_sketch)
    return NonFiniteWatch(shared_inputs, ProcessGroup()), shared_inputs, layers


def record(shared_inputs: SharedInputs, target_layer: TargetLayer, x: torch.Tensor) -> None:
    shared_inputs.record(target_layer, x, None, lambda sketch: sketch.summarize(x))
    shared_inputs.end_of_forward()


def test_a_layer_with_bad_rows_does_not_spoil_the_others() -> None:
    calibration = every_outcome()
    assert calibration.spectra["fine"].rows == 240
    assert calibration.spectra["nan"].rows == 0
    assert torch.isfinite(calibration.spectra["fine"].energies).all()


def test_the_first_bad_batch_is_noted_and_the_layer_watched_no_more() -> None:
    watch, shared_inputs, (bad, fine) = watched()
    for number, value in enumerate((1.0, torch.nan, torch.inf), start=1):
        record(shared_inputs, bad, torch.full((3, 4), value))
        record(shared_inputs, fine, torch.ones(3, 4))
        watch.check(number)
    assert watch.first_seen == {"0": (2, 0)}
    assert shared_inputs.group_of("0") is None
    group = shared_inputs.group_of("1")
    assert group is not None
    assert group.sketch.count == 9


def test_of_all_processes_the_earliest_batch_counts_in_whatever_order_they_tell() -> None:
    first, second = {"0": [5, 0], "1": [2, 0]}, {"0": [3, 1]}
    for everyone in ([first, second], [second, first], [first, {}, second]):
        watch, _, _ = watched()
        watch.merge(everyone)
        assert watch.first_seen == {"0": (3, 1), "1": (2, 0)}


def test_of_one_batch_the_first_process_counts() -> None:
    watch, _, _ = watched()
    watch.merge([{"0": [4, 1]}, {"0": [4, 0]}])
    assert watch.first_seen == {"0": (4, 0)}


def test_a_layer_that_was_bad_in_another_process_is_not_watched_here() -> None:
    watch, shared_inputs, (bad, _) = watched()
    record(shared_inputs, bad, torch.ones(3, 4))
    watch.merge([{}, {"0": [1, 1]}])
    record(shared_inputs, bad, torch.ones(3, 4))
    assert shared_inputs.group_of("0") is None
