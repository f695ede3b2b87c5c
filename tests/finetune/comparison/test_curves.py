"""What is read off the curves of runs."""

from __future__ import annotations

import math

from evatune.finetune.comparison.curves import convergence, sooner_by, steps_until
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
    diverged = other.model_copy(update={"diverged": True})
    assert sooner_by(diverged, one) == -sooner_by(one, diverged) == -1
    assert sooner_by(diverged, diverged) == 0
    first, *later = one.curve
    broken = one.model_copy(update={"curve": (first, (1, None, None), *later)})
    assert sooner_by(broken, broken) == 0


def test_a_run_that_diverged_has_gained_nothing_and_counts() -> None:
    lines = tuned_lines(methods=("lora", "eva"), tasks=("digits",))
    lora, eva = (
        {line.seed: line for line in lines if line.tested and line.method == method}
        for method in ("lora", "eva")
    )
    lost = {seed: line.model_copy(update={"diverged": seed == 10}) for seed, line in eva.items()}
    facts = convergence(lost, lora, {})
    assert facts.area.keys() == facts.sooner.keys() == eva.keys()
    assert (facts.area[10], facts.sooner[10]) == (1, -1)
    against = convergence(lora, lost, {})
    assert against.sooner[10] == 1
    assert 10 not in against.area  # there is no improvement to be a share of
