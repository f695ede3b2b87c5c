"""What is read off the curves of runs."""

from __future__ import annotations

import math

from evatune.finetune.curves import sooner_by, steps_until
from tests.tuned_lines import tuned_lines


def test_steps_are_interpolated_between_evaluations() -> None:
    curve = [(0, 4.0, None), (10, 2.0, None), (20, None, None), (30, 0.0, None)]
    assert steps_until(curve, 3.0) == 5
    assert steps_until(curve, 4.5) == 0
    assert steps_until(curve, 1.0) == math.inf


def test_methods_that_differ_by_chance_are_as_often_sooner_as_later() -> None:
    lines = tuned_lines(methods=("lora", "eva"), tasks=("digits",))
    one, other = (
        next(line for line in lines if line.tested and line.method == method)
        for method in ("lora", "eva")
    )
    assert sooner_by(other, one) == -sooner_by(one, other) > 0
    assert sooner_by(other.model_copy(update={"diverged": True}), one) == -1
    first, *later = one.curve
    broken = one.model_copy(update={"curve": (first, (1, None, None), *later)})
    assert sooner_by(broken, broken) == 0
