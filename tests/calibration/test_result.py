"""What is done with a calibration."""

from __future__ import annotations

from typing import Any

import pytest

import evatune
from evatune import CalibrationConfig
from evatune.errors import ConfigError, LayerError
from tests.helpers import Toy, every_outcome, inputs


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
