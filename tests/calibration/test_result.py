"""What is done with a calibration."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import evatune
from evatune import CalibrationConfig
from evatune.errors import ConfigError, LayerError
from tests.helpers import Toy, every_outcome, inputs


def test_the_rows_that_lack_are_counted_by_what_the_layer_can_use() -> None:
    calibration = evatune.calibrate(
        nn.Sequential(nn.Linear(32, 3)), [torch.randn(2, 32)], CalibrationConfig(rank=8)
    )
    with pytest.raises(LayerError, match=r"0 \(2 rows for 3 components\)"):
        calibration.require_usable()


def test_layers_that_cannot_be_initialized_are_listed_with_the_batch_and_what_to_try() -> None:
    with pytest.raises(LayerError) as caught:
        every_outcome().require_usable()
    message = str(caught.value)
    assert message.startswith("4 of 5 layers cannot be initialized")
    for part in (
        "nan (first in batch 3)",
        "few (1 rows for 4 components)",
        "zero",
        "unused",
        "exclude_modules",
    ):
        assert part in message


@pytest.mark.parametrize(
    "options",
    [{"rho": float("inf")}, {"rank": 2.5}, {"min_rank": 1.5}, {"metric": ""}, {"budget": ""}],
)
def test_allocate_names_options_of_the_wrong_kind(options: dict[str, Any]) -> None:
    calibration = evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4))
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        calibration.allocate(**options)


@pytest.fixture(scope="module")
def calibration() -> evatune.Calibration:
    return evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4, sketch="exact"))


def test_the_learning_rate_is_loras_over_the_median_step_ratio(
    calibration: evatune.Calibration,
) -> None:
    plan = calibration.allocate()
    assert len(set(plan.ranks.values())) > 1
    aim = {}
    for name, rank in plan.ranks.items():
        if rank:
            spectrum = calibration.spectra[name]
            share = float(spectrum.energies[:rank].sum()) / spectrum.total_energy
            aim[name] = (3 * spectrum.directions.shape[1] * share / 4) ** 0.5
    assert calibration.step_ratios("paper") == pytest.approx(aim, rel=1e-5)
    rate = calibration.learning_rate(2e-4, scale="paper")
    assert rate == pytest.approx(2e-4 / median(aim.values()), rel=1e-5)
    uniform = calibration.allocate(rho=1)
    matched = calibration.step_ratios("matched", uniform)
    assert matched == pytest.approx(dict.fromkeys(uniform.ranks, 1))


def test_a_layer_is_compared_with_lora_at_the_rank_that_its_pattern_gives(
    calibration: evatune.Calibration,
) -> None:
    name = "blocks.0.q"
    layers = calibration.layers | {name: replace(calibration.layers[name], cap=2)}
    capped = replace(calibration, layers=layers)
    rank = capped.allocate().ranks[name]
    assert capped.step_ratios("matched")[name] == pytest.approx((rank / 2) ** 0.5)


@pytest.mark.parametrize("rate", [0, -1e-4, float("nan"), float("inf"), "2e-4", True, None])
def test_a_learning_rate_that_is_none_is_refused(
    calibration: evatune.Calibration, rate: Any
) -> None:
    with pytest.raises(ConfigError, match=r"lora_rate is .*a number above 0, such as 2e-4"):
        calibration.learning_rate(rate)


def test_a_rate_of_numpys_is_a_rate_and_an_unknown_scale_names_those_there_are(
    calibration: evatune.Calibration,
) -> None:
    assert calibration.learning_rate(np.float64(1e-3)) == calibration.learning_rate(1e-3)
    with pytest.raises(ConfigError, match=r"scale is 'big'; choose one of .*whiten-matched"):
        calibration.learning_rate(1e-3, scale="big")


def test_results_are_shown_in_one_line(calibration: evatune.Calibration) -> None:
    assert repr(every_outcome()) == (
        "<Calibration of Faulty: 5 layers with 3 inputs, 6 batches; 1 data_exhausted, 1 no_signal,"
        " 1 non_finite, 1 too_few_rows, 1 never_called>"
    )
    plan = calibration.allocate()
    spectrum = next(iter(calibration.spectra.values()))
    for shown in (repr(calibration), repr(plan), repr(spectrum)):
        assert len(shown) < 160, shown
        assert "\n" not in shown
    assert f"{sum(plan.ranks.values())} ranks" in repr(plan)
    assert f"{len(spectrum.energies)} of {spectrum.directions.shape[1]} directions" in repr(
        spectrum
    )
