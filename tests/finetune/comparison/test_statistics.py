"""Statistics of a comparison: planted answers, SciPy's, and those of worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evatune.errors import ConfigError
from evatune.finetune.comparison.statistics import (
    DomainDifference,
    Interval,
    average_ranks,
    compare_domain,
    critical_difference,
    hierarchical_bootstrap,
    holm,
    paired_differences,
)

SEEDS = range(5)
LORA = [0.70, 0.72, 0.69, 0.71, 0.74]
EVA = [0.74, 0.73, 0.75, 0.72, 0.78]


def by_seed(scores: list[float]) -> dict[int, float | None]:
    return dict(enumerate(scores))


def scores_of(means: dict[str, list[float]]) -> dict[str, dict[str, dict[int, float | None]]]:
    """Return scores without deviation, from each method's means over the tasks a, b, …"""
    tasks = "abcdef"[: len(next(iter(means.values())))]
    return {
        task: {method: dict.fromkeys(SEEDS, values[i]) for method, values in means.items()}
        for i, task in enumerate(tasks)
    }


def planted(effects: np.ndarray, rng: np.random.Generator) -> DomainDifference:
    """Return the average over tasks of these effects, of five seeds with deviations of 0.01."""
    scores = {
        str(i): {
            "lora": dict.fromkeys(SEEDS, 0.5),
            "eva": by_seed(rng.normal(0.5 + effect, 0.01, 5).tolist()),
        }
        for i, effect in enumerate(effects)
    }
    return compare_domain(scores).methods[0]


def test_a_paired_difference_is_that_of_scipy() -> None:
    (line,) = paired_differences({"t": {"lora": by_seed(LORA), "eva": by_seed(EVA)}})
    expected = stats.ttest_rel(EVA, LORA)
    interval = expected.confidence_interval(0.95)
    differences = np.subtract(EVA, LORA)
    assert (line.task, line.method, line.reference) == ("t", "eva", "lora")
    assert line.mean == pytest.approx(0.032)
    assert line.test is not None
    assert line.test.p_value == pytest.approx(expected.pvalue)
    assert line.test.interval.low == pytest.approx(interval.low)
    assert line.test.interval.high == pytest.approx(interval.high)
    assert line.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert line.outcome == "win"


def test_seeds_are_paired_by_number_and_those_of_one_method_alone_are_left_out() -> None:
    lora: dict[int, float | None] = {0: 0.1, 1: 0.2, 2: 0.3, 9: 0.9}
    eva: dict[int, float | None] = {2: 0.5, 7: 0.0, 0: 0.2}
    (line,) = paired_differences({"t": {"eva": eva, "lora": lora}})
    assert line.seeds == (0, 2)
    assert line.differences == (0.1, 0.2)


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.1, 0.3, "win"), (0.0, 0.2, "tie"), (-0.2, 0.0, "tie"), (-0.3, -0.1, "loss")],
)
def test_a_tie_is_an_interval_that_holds_0(low: float, high: float, outcome: str) -> None:
    assert Interval(low, high).outcome == outcome
    assert Interval(low, high).half_width == pytest.approx((high - low) / 2)


def test_a_single_seed_has_no_interval() -> None:
    (line,) = paired_differences({"t": {"lora": {3: 0.5}, "eva": {3: 0.6}}})
    assert line.mean == 0.1
    assert (line.test, line.effect_size, line.outcome) == (None, None, None)


@pytest.mark.parametrize(
    ("gain", "p_value", "outcome"), [(0.01, 0.0, "win"), (0.0, 1.0, "tie"), (-0.01, 0.0, "loss")]
)
def test_equal_differences_have_no_deviation_though_rounded(
    gain: float, p_value: float, outcome: str
) -> None:
    eva = by_seed([score + gain for score in LORA])
    (line,) = paired_differences({"t": {"lora": by_seed(LORA), "eva": eva}})
    assert line.test is not None
    assert line.test.interval == Interval(gain, gain)
    assert (line.test.p_value, line.outcome, line.effect_size) == (p_value, outcome, None)


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_score_that_is_not_finite_counts_as_0_and_is_named(score: float | None) -> None:
    scores = {"t": {"lora": {0: 0.5, 1: score}, "eva": {0: score, 1: score}}}
    (line,) = paired_differences(scores)
    assert line.differences == (-0.5, 0.0)
    assert (line.diverged, line.reference_diverged) == (2, 1)


def test_a_domains_mean_gives_every_task_one_weight() -> None:
    scores = {
        "a": {"lora": by_seed(LORA), "eva": by_seed([x + 0.03 for x in LORA])},
        "b": {"lora": {0: 0.5, 1: 0.5}, "eva": {0: 0.5, 1: 0.52}},
    }
    (eva,) = compare_domain(scores).methods
    assert eva.mean == pytest.approx((0.03 + 0.01) / 2)
    assert (eva.wins, eva.ties, eva.losses) == (1, 1, 0)


def test_the_test_on_given_tasks_is_scipys() -> None:
    a, b = [0.01, 0.03, 0.02, 0.05, 0.03], [0.02, 0.01, -0.01, 0.0, 0.03]
    zeros = by_seed([0.0] * 5)
    scores = {
        "a": {"lora": zeros, "eva": by_seed(a)},
        "b": {"lora": zeros, "eva": by_seed(b)},
    }
    (eva,) = compare_domain(scores).methods
    assert eva.fixed_tasks is not None
    # (mean of a + mean of b) / 2 is half of Welch's difference of a and −b
    welch = stats.ttest_ind(a, np.negative(b), equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert eva.fixed_tasks.p_value == pytest.approx(welch.pvalue)
    assert eva.fixed_tasks.interval.low == pytest.approx(interval.low / 2)
    assert eva.fixed_tasks.interval.high == pytest.approx(interval.high / 2)


def test_the_test_on_other_tasks_is_scipys_over_means_of_tasks() -> None:
    rows = {"a": [0.01, 0.03], "b": [0.22, 0.21], "c": [-0.15, -0.14]}
    zeros = by_seed([0.0] * 2)
    scores = {task: {"lora": zeros, "eva": by_seed(row)} for task, row in rows.items()}
    (eva,) = compare_domain(scores).methods
    assert eva.random_tasks is not None
    over_tasks = stats.ttest_1samp([np.mean(row) for row in rows.values()], 0)
    assert eva.random_tasks.p_value == pytest.approx(over_tasks.pvalue)
    assert eva.random_tasks.interval.low == pytest.approx(over_tasks.confidence_interval(0.95).low)


def test_tasks_that_are_closer_than_their_seeds_allow_make_nothing_surer() -> None:
    rows = ([-0.05, 0.07, 0.01], [-0.04, 0.06, 0.01], [-0.06, 0.08, 0.01])  # all of one mean
    zeros = by_seed([0.0] * 3)
    scores = {str(n): {"lora": zeros, "eva": by_seed(row)} for n, row in enumerate(rows)}
    (eva,) = compare_domain(scores).methods
    assert eva.fixed_tasks is not None
    assert eva.random_tasks is not None
    assert eva.random_tasks.interval.half_width > eva.fixed_tasks.interval.half_width > 0.01


def test_intervals_hold_a_planted_effect_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = {"fixed": 0, "random": 0, "fixed as if random": 0}
    repeats = 60
    for _ in range(repeats):
        effects = rng.normal(0.02, 0.02, 4)
        eva = planted(effects, rng)
        assert eva.fixed_tasks is not None
        assert eva.random_tasks is not None
        fixed, random = eva.fixed_tasks.interval, eva.random_tasks.interval
        held["fixed"] += fixed.low <= effects.mean() <= fixed.high
        held["random"] += random.low <= 0.02 <= random.high
        held["fixed as if random"] += fixed.low <= 0.02 <= fixed.high
    # 95 % give or take three standard errors of 60 repeats
    assert held["fixed"] / repeats == pytest.approx(0.95, abs=0.085)
    assert held["random"] / repeats == pytest.approx(0.95, abs=0.085)
    assert held["fixed as if random"] / repeats < 0.7


def test_a_method_that_lacks_a_task_is_named_and_in_no_average() -> None:
    scores = scores_of({"lora": [0.5, 0.5], "eva": [0.6, 0.6], "dora": [0.9, 0.9]})
    del scores["b"]["dora"]
    scores["b"]["late"] = {99: 0.9}
    scores["c"] = {"eva": {0: 0.1}}
    domain = compare_domain(scores)
    assert domain.tasks == ("a", "b")
    assert domain.left_out_tasks == ("c",)
    assert domain.incomplete_methods == {"dora": ("b",), "late": ("a", "b")}
    assert [line.method for line in domain.methods] == ["eva"]
    assert list(domain.ranks.ranks) == ["lora", "eva"]
    assert ("a", "dora") in [(line.task, line.method) for line in domain.paired]


def test_two_tasks_have_no_interval_over_tasks() -> None:
    runs = {"lora": by_seed(LORA), "eva": by_seed(EVA)}
    (eva,) = compare_domain({"a": runs, "b": runs}).methods
    assert (eva.random_tasks, eva.random_tasks_holm) == (None, None)
    assert eva.bootstrap is not None


def test_one_task_has_no_interval_over_tasks() -> None:
    (eva,) = compare_domain({"t": {"lora": by_seed(LORA), "eva": by_seed(EVA)}}).methods
    (line,) = paired_differences({"t": {"lora": by_seed(LORA), "eva": by_seed(EVA)}})
    assert (eva.random_tasks, eva.random_tasks_holm, eva.bootstrap) == (None, None, None)
    assert eva.fixed_tasks is not None
    assert line.test is not None
    assert eva.fixed_tasks.interval.low == pytest.approx(line.test.interval.low)


def test_single_seeds_have_an_interval_over_tasks_alone() -> None:
    scores = {
        "a": {"lora": {0: 0.5}, "eva": {0: 0.6}},
        "b": {"lora": {0: 0.5}, "eva": {0: 0.7}},
        "c": {"lora": {0: 0.5}, "eva": {0: 0.5}},
    }
    (eva,) = compare_domain(scores).methods
    assert (eva.fixed_tasks, eva.fixed_tasks_holm, eva.bootstrap) == (None, None, None)
    assert eva.random_tasks is not None
    assert (eva.wins, eva.ties, eva.losses) == (0, 0, 0)


def test_without_the_reference_there_is_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="no task has a score of the reference 'lora' and one"):
        compare_domain({"t": {"eva": {0: 0.5}, "lora": {1: 0.5}}})


def test_the_bootstrap_draws_tasks_and_seeds_within_them() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(4, 1)) + rng.normal(size=(4, 5))
    means = hierarchical_bootstrap(differences.tolist(), resamples=40_000)
    # n draws of n have 1/n of the variance of n, and here one of tasks and one of seeds
    expected = differences.mean(axis=1).var() / 4 + differences.var(axis=1).mean() / 20
    assert means.mean() == pytest.approx(differences.mean(), abs=0.01)
    assert means.var() == pytest.approx(expected, rel=0.03)


def test_the_bootstrap_takes_tasks_of_fewer_seeds() -> None:
    means = hierarchical_bootstrap([[1.0] * 5, [3.0, 3.0]], resamples=1000)
    assert sorted(set(means)) == [1.0, 2.0, 3.0]


def test_the_bootstrap_is_the_same_again_and_another_for_another_seed() -> None:
    differences = [LORA, EVA]
    first = hierarchical_bootstrap(differences)
    assert (first == hierarchical_bootstrap(differences)).all()
    assert not (first == hierarchical_bootstrap(differences, seed=1)).all()


def test_the_bootstrap_interval_is_of_its_quantiles() -> None:
    differences = {"a": [0.01, 0.03, 0.02], "b": [0.05, 0.04, 0.07], "c": [-0.01, 0.0, 0.02]}
    zeros = by_seed([0.0] * 3)
    scores = {task: {"lora": zeros, "eva": by_seed(row)} for task, row in differences.items()}
    (eva,) = compare_domain(scores, seed=3).methods
    quantiles = np.quantile(hierarchical_bootstrap([*differences.values()], 3), [0.025, 0.975])
    assert eva.bootstrap is not None
    assert [eva.bootstrap.low, eva.bootstrap.high] == pytest.approx(quantiles)


def test_holm_of_a_worked_example() -> None:
    # sorted: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1, which is raised to the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_counts_only_the_p_values_that_there_are() -> None:
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]


def test_a_domains_p_values_are_corrected_over_its_methods() -> None:
    rng = np.random.default_rng(0)
    scores = {
        task: {
            method: by_seed(rng.normal(mean, 0.01, 5).tolist())
            for method, mean in {"lora": 0.5, "eva": 0.51, "dora": 0.5, "full": 0.53}.items()
        }
        for task in "abcd"
    }
    methods = compare_domain(scores).methods
    for name in ("fixed_tasks", "random_tasks"):
        p_values = [getattr(method, name).p_value for method in methods]
        assert [getattr(method, f"{name}_holm") for method in methods] == holm(p_values)


def test_ranks_share_ties_and_are_averaged_over_tasks() -> None:
    scores = scores_of({"lora": [0.5, 0.5], "eva": [0.7, 0.5], "dora": [0.7, 0.6], "x": [0.1, 0.1]})
    ranks = average_ranks(paired_differences(scores))
    assert ranks.ranks == {"lora": 2.75, "eva": 2.0, "dora": 1.25, "x": 4.0}
    assert ranks.tasks == 2


def test_friedmans_p_value_is_scipys_and_1_where_all_are_equal() -> None:
    means = {"lora": [0.5, 0.4, 0.3], "eva": [0.7, 0.5, 0.2], "dora": [0.8, 0.6, 0.4]}
    ranks = average_ranks(paired_differences(scores_of(means)))
    assert ranks.friedman_p == pytest.approx(stats.friedmanchisquare(*means.values()).pvalue)
    equal = scores_of({"lora": [0.5, 0.6], "eva": [0.5, 0.6], "dora": [0.5, 0.6]})
    assert average_ranks(paired_differences(equal)).friedman_p == 1.0


def test_the_critical_difference_is_that_of_demsars_table() -> None:
    # Demšar 2006, section 3.2.2: 4 classifiers, 14 data sets, q = 2.569
    assert critical_difference(4, 14) == pytest.approx(2.569 * math.sqrt(20 / 84), abs=5e-4)
    assert critical_difference(2, 10) == pytest.approx(1.960 * math.sqrt(6 / 60), abs=5e-4)
    assert critical_difference(1, 10) is None
    assert critical_difference(4, 1) is None
