"""The search of a learning rate, on losses that are known."""

from __future__ import annotations

import math

import pytest

from evatune.errors import ConfigError
from evatune.finetune.comparison.rate_rule import (
    Seeds,
    Trial,
    chosen,
    next_trials,
    positions,
    rate_at,
)

SEEDS = Seeds((0, 1, 2), (10, 11))


def searched(best: float, *, diverges_from: float = math.inf) -> list[Trial]:
    """Return all trials of a search whose loss is smallest at `best`."""
    losses: dict[tuple[int, int], float] = {}
    trials: list[Trial] = []
    while wanted := next_trials(losses, SEEDS):
        assert len(trials) < 60
        for trial in wanted:
            loss = abs(trial.position - best) + 0.01 * trial.seed
            diverged = trial.position >= diverges_from
            losses[trial.position, trial.seed] = math.inf if diverged else loss
            trials.append(trial)
    assert len(set(trials)) == len(trials)
    return trials


def test_a_search_is_a_grid_then_more_seeds_at_three_rates_then_tests_at_one() -> None:
    trials = searched(0.2)
    assert [trial.position for trial in trials[:5]] == [0, -1, 1, -2, 2]
    assert {trial.seed for trial in trials[:5]} == {0}
    finalists = {(trial.position, trial.seed) for trial in trials[5:11]}
    assert finalists == {(position, seed) for position in (-1, 0, 1) for seed in (1, 2)}
    assert trials[11:] == [Trial(0, 10, tested=True), Trial(0, 11, tested=True)]


@pytest.mark.parametrize("best", [-6, -3, 2, 5])
def test_the_grid_grows_until_the_best_rate_lies_inside(best: int) -> None:
    trials = searched(best)
    tuned = {trial.position for trial in trials if not trial.tested}
    assert {best - 1, best, best + 1} <= tuned
    assert {trial.position for trial in trials if trial.tested} == {best}


def test_a_best_rate_beyond_all_bounds_is_chosen_at_the_edge() -> None:
    trials = searched(100)
    positions_tried = {trial.position for trial in trials}
    assert len(positions_tried) == 13
    losses = {(t.position, t.seed): abs(t.position - 100.0) for t in trials}
    assert chosen(losses, SEEDS) == max(positions_tried)


def test_rates_that_diverge_are_never_chosen_and_a_search_that_only_diverges_ends() -> None:
    assert {trial.position for trial in searched(2, diverges_from=1) if trial.tested} == {0}
    nowhere = searched(0, diverges_from=-99)
    assert not any(trial.tested for trial in nowhere)
    assert len(nowhere) == 13 or len(nowhere) == 14  # two at a time


def test_a_grid_that_ends_alike_everywhere_is_no_grid_with_a_best_rate_inside() -> None:
    # Above a rate of -4 the model falls to chance, a loss of 2.77 but for noise.
    def loss(position: int) -> float:
        return 2.77 + 0.01 * (position % 3) if position > -4 else 0.5 + 0.1 * abs(position + 5)

    losses = {(position, 0): loss(position) for position in range(-2, 3)}
    while trials := next_trials(losses, SEEDS):
        losses |= {(trial.position, trial.seed): loss(trial.position) for trial in trials}
    assert chosen(losses, SEEDS) == -5


def test_the_mean_over_seeds_decides_and_not_the_first_seed() -> None:
    losses = {(position, 0): abs(position) + 0.0 for position in range(-2, 3)}
    for seed in (1, 2):
        losses |= {(-1, seed): 3.0, (0, seed): 2.0, (1, seed): 1.0}
    assert chosen(losses, SEEDS) == 1


def test_nothing_is_chosen_before_the_search_has_ended() -> None:
    losses = {(position, 0): abs(position) + 0.0 for position in range(-2, 3)}
    assert chosen(losses, SEEDS) is None


def test_rates_are_the_recipes_times_powers_and_known_again() -> None:
    assert rate_at(0, 5e-3) == 5e-3
    assert rate_at(4, 5e-3) == 5e-2
    assert rate_at(1, 1e-2) == 0.01778
    assert positions(1e-2)[0.01778] == 1


@pytest.mark.parametrize(
    ("tuning", "test", "message"),
    [((0, 1), (1, 2), "share 1, so that"), ((), (1,), "needs seeds"), ((0,), (), "needs seeds")],
)
def test_seeds_that_would_be_chosen_by_and_reported_are_refused(
    tuning: tuple[int, ...], test: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Seeds(tuning, test)
