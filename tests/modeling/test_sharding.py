"""Weights that are elsewhere: those that come in time, and those that are not there."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import evatune
from evatune import Calibration, CalibrationConfig
from evatune.errors import AdapterError
from tests.helpers import Toy, inputs

torch.set_num_threads(1)


SMALL = CalibrationConfig(rank=2, max_batches=4, tolerance=0)


def test_a_model_on_the_meta_device_is_refused_with_a_weight_named_and_what_to_do() -> None:
    with torch.device("meta"):
        model = Toy()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q"]))
    finished = evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=8), targets=["q"])
    for door in (
        lambda: evatune.calibrate(model, inputs()),
        lambda: evatune.initialize(adapted, inputs()),
        lambda: evatune.initialize(adapted, finished),
    ):
        with pytest.raises(
            AdapterError, match=r"blocks\.0\.q.*weight is on the meta device.*load the weights"
        ):
            door()


def test_one_layer_left_on_the_meta_device_is_named() -> None:
    model = Toy()
    model.blocks[1].down.to("meta")
    with pytest.raises(AdapterError, match=r"blocks\.1\.down\.weight is on the meta device"):
        evatune.calibrate(model, inputs(), targets=["q"])


def test_weights_that_accelerate_has_offloaded_are_there() -> None:
    from accelerate import cpu_offload

    usual = evatune.calibrate(Toy(), inputs(), SMALL)
    model = cpu_offload(Toy(), execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    found = evatune.calibrate(model, inputs(), SMALL)
    assert isinstance(found, Calibration)
    assert torch.equal(
        found.spectra["blocks.0.q"].directions, usual.spectra["blocks.0.q"].directions
    )
