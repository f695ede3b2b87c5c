"""Settings of a calibration, and those that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import evatune
from evatune import CalibrationConfig
from evatune.errors import ConfigError
from tests.helpers import Toy, inputs


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1$"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be below 2 to the power 63$"),
        ({"rho": 0.99}, "rho is 0.99"),
        ({"components": 0}, "components is 0"),
        ({"max_batches": 0}, "max_batches is 0"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
        ({"oversampling": -1}, "oversampling is -1"),
        ({"sketch": "svd"}, "choose one of nystrom, exact, incremental"),
        ({"budget": "x"}, "choose one of ranks, parameters"),
        ({"metric": "x"}, "choose one of ratio, raw, max, sum"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CalibrationConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"rho": float("inf")},
        {"rho": "2"},
        {"rank": 2.5},
        {"rank": "16"},
        {"components": 2.5},
        {"max_batches": 2.5},
        {"oversampling": 1.5},
        {"seed": 1.5},
        {"seed": -1},
        {"center": 1},
        {"center": "yes"},
        {"distributed": None},
        {"labels_only": 1},
        {"labels_only": 0},
        {"tolerance": "0.1"},
        {"tolerance": None},
        {"tolerance": True},
        {"tolerance": np.float32(0.01)},
        {"ignore_index": -100.0},
        {"ignore_index": "x"},
        {"rendezvous_timeout": "120"},
    ],
)
def test_settings_of_the_wrong_kind_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        CalibrationConfig(**options)


def test_a_large_seed_is_fine() -> None:
    assert (
        evatune.calibrate(
            Toy(), inputs(), CalibrationConfig(rank=4, seed=2**62, tolerance=0)
        ).batches
        == 6
    )
