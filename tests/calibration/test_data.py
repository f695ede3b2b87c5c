"""A calibration as plain data."""

from __future__ import annotations

import platform

import torch

import evatune
from evatune import CalibrationConfig
from evatune.calibration.data import CalibratedLayer, CalibrationData
from evatune.layers import LayerSpec


def test_data_says_which_versions_made_it_and_keeps_those_that_it_is_given() -> None:
    made = CalibrationData({}, {}, {}, CalibrationConfig(), batches=3)
    assert made.versions == {
        "evatune": evatune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    assert (made.batches, made.processes, made.bytes_sent) == (3, 1, 0)
    old = {"evatune": "0.0.1"}
    read = CalibrationData({}, {}, {}, CalibrationConfig(), batches=3, versions=old)
    assert read.versions == old


def test_a_layer_is_as_wide_as_its_spec_and_its_ranks_are_free_unless_something_bounds_them() -> (
    None
):
    layer = CalibratedLayer(LayerSpec("a", in_features=5, out_features=7), input=0)
    assert (layer.in_features, layer.out_features) == (5, 7)
    assert (layer.cap, layer.floor) == (None, 0)
    assert (layer.first_bad_batch, layer.bad_process) == (None, None)
