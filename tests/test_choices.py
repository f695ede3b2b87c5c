"""Named options: the types, the registries behind them, and the check."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

import evatune
from evatune import choices
from evatune.errors import ConfigError
from evatune.sketch import SKETCHES


def test_the_names_of_sketches_are_those_of_the_registry() -> None:
    assert tuple(SKETCHES) == choices.SKETCH_NAMES


def test_the_public_signatures_name_the_choices() -> None:
    hints = get_type_hints(evatune.CalibrationConfig)
    assert hints["sketch"] == choices.SketchName
    assert hints["metric"] == choices.Metric
    assert hints["budget"] == choices.Budget
    assert hints["objective"] == choices.Objective
    named = {"scale": choices.Scale, "metric": choices.Metric, "budget": choices.Budget}
    signature = get_type_hints(evatune.initialize)
    assert {name: get_args(signature[name])[0] for name in named} == named


def test_what_is_no_choice_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError) as caught:
        choices.require_choice("scale", "papers", choices.SCALES)
    assert str(caught.value) == (
        "scale is 'papers'; choose one of paper, whiten, matched, whiten-matched"
    )
