"""What the probe's tables say of lines."""

from __future__ import annotations

import pytest


def line(start, rate, seed, loss, test):
    points = [(0, 3.0), (3, 2.5), (6, 2.0), (12, loss)]
    return {
        "task": "toy",
        "start": start,
        "rank": 2,
        "rate": rate,
        "seed": seed,
        "steps": 12,
        "kappa": 1.0,
        "diverged": False,
        "curve": [{"step": step, "loss": value, "score": 0.5} for step, value in points],
        "test": {"loss": test, "score": 1 - test},
    }


def searched(start, *, losses, tests, rate=0.01):
    """Lines of three rates, at the middle one of which each seed has its own losses."""
    near = [
        line(start, other, seed, 2.0, 9.0)
        for other in (rate / 1.78, rate * 1.78)
        for seed in range(3)
    ]
    middle = [
        line(start, rate, seed, *each) for seed, each in enumerate(zip(losses, tests, strict=True))
    ]
    return near + middle


def test_differences_are_paired_by_seed_at_the_rate_that_validation_chose(tables):
    lines = searched("lora", losses=[1.0, 1.1, 1.2], tests=[0.5, 0.6, 0.7])
    lines += searched("eva", losses=[0.9, 1.0, 1.1], tests=[0.4, 0.5, 0.7], rate=0.001)[::-1]

    eva = tables.grid_table(lines, "toy", 2).splitlines()[-1]

    cells = [cell.strip() for cell in eva.strip("|").split("|")]
    assert cells[:4] == ["eva", "1.00", "1.0e-03", "10.0"]
    assert cells[4:6] == ["2.500, 2.000, 1.000", "-0.100 ± 0.000"]
    # mean -0.0667, standard error 0.0333, 4.303 of them
    assert cells[7:9] == ["0.533", "-0.067 ± 0.143"]


@pytest.mark.parametrize(("loss", "step"), [(2.0, 4), (1.75, 5), (1.5, 6), (1.0, None), (2.5, 2)])
def test_steps_until_a_loss_lie_on_the_lines_between_the_points(tables, loss, step):
    curve = [{"step": step, "loss": value} for step, value in [(0, 3.0), (4, 2.0), (8, 1.0 + 1e-9)]]

    found = tables.steps_until(curve, loss)

    assert found == (None if step is None else pytest.approx(step))


def test_room_is_what_full_fine_tuning_adds_to_loras_gain(tables):
    lines = [
        line(start, rate, 0, loss, 9.0) | {"participation": 7.0, "cpu_seconds": 4.0}
        for start, rate, loss in [("lora", 0.01, 2.0), ("lora", 0.1, 2.5), ("full", 0.001, 1.5)]
    ]

    row = tables.choose_table(lines).splitlines()[-1]

    assert "| +50.0% |" in row
    assert "2.000, 0.500 (1.0e-02) | 1.500, 0.500 (1.0e-03)" in row
