"""The statistics of a comparison: paired differences of scores, per task and over a domain.

What varies is the seed, and with it start and order of the data. Training, validation and test
examples are the same for all seeds, so no interval here tells how the scores would be on others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evatune.errors import ConfigError
from evatune.finetune.recipe import REFERENCE
from evatune.utils.extras import extras

with extras(__name__):
    from scipy import stats

Scores = Mapping[str, Mapping[str, Mapping[int, float | None]]]  # [task][method][seed]
Vector = NDArray[np.float64]

_CONFIDENCE = 0.95
_RESAMPLES = 10_000
_FEWEST_TASKS = 3  # that say how tasks vary
# Of a difference of scores: 0.91 − 0.90 is 0.92 − 0.91, and no deviation comes from rounding.
_DECIMALS = 12


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def outcome(self) -> Literal["win", "tie", "loss"]:
        """A tie where the interval holds 0, its ends included."""
        if self.low > 0:
            return "win"
        return "loss" if self.high < 0 else "tie"


@dataclass(frozen=True)
class TTest:
    """The 95 % interval of a mean, and the two-sided p-value of its being 0."""

    interval: Interval
    p_value: float


@dataclass(frozen=True)
class PairedDifference:
    """A method's score less the reference's on one task, seed by seed."""

    task: str
    method: str
    reference: str
    seeds: tuple[int, ...]  # those that both have
    differences: tuple[float, ...]  # one per seed
    mean: float
    test: TTest | None  # t over seeds; None for a single one
    effect_size: float | None  # Cohen's d_z, mean / deviation; None where there is no deviation
    diverged: int  # runs of the method without a finite score, which count as 0
    reference_diverged: int

    @property
    def outcome(self) -> Literal["win", "tie", "loss"] | None:
        """That of the interval; None without one."""
        return self.test.interval.outcome if self.test else None


@dataclass(frozen=True)
class DomainDifference:
    """A method's mean difference to the reference over the tasks of a domain, all of one weight.

    Three intervals answer two questions. "Is it better on these tasks?": `fixed_tasks`.
    "Would it be better on other tasks like these?": `random_tasks`, which is wider, and which
    `bootstrap` estimates without a normal distribution. Other tasks are other ones of the same
    domains: of a domain that is not here no interval tells.

    Attributes:
        fixed_tasks: t over seeds, the tasks being given. None where a task has a single seed.
        random_tasks: t over the means of tasks, which hold the seeds' deviations too, with at
            least the standard error of `fixed_tasks`. None for fewer than three tasks.
        bootstrap: 2.5 and 97.5 % quantiles of `hierarchical_bootstrap`. Too narrow with few
            tasks: of four that differ more than their seeds do, it holds the truth in about 80 %
            of cases and not in 95. None for a single task, or where a task has a single seed.
        fixed_tasks_holm, random_tasks_holm: the p-values of the tests, corrected for the number of
            methods.
        effect_size: mean / deviation over the means of tasks; None where there is no deviation.
        wins, ties, losses: tasks. One with a single seed is neither.
    """

    method: str
    mean: float
    fixed_tasks: TTest | None
    random_tasks: TTest | None
    bootstrap: Interval | None
    fixed_tasks_holm: float | None
    random_tasks_holm: float | None
    effect_size: float | None
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class AverageRanks:
    """The mean rank of each method over tasks: 1 is the best, equal methods share theirs.

    Attributes:
        friedman_p: p-value of all methods being equal, by Friedman's test. None for fewer than
            two tasks or three methods.
        critical_difference: two methods whose mean ranks are further apart differ at 5 %, by
            Nemenyi's test. None for fewer than two tasks or methods.
    """

    ranks: dict[str, float]
    tasks: int
    friedman_p: float | None
    critical_difference: float | None


@dataclass(frozen=True)
class DomainComparison:
    """All methods against the reference on the tasks of one domain.

    Attributes:
        tasks: those on which the reference and another method have a seed in common.
        left_out_tasks: the others.
        methods: those that have every one of `tasks`. incomplete_methods: the others, with the
            tasks that each lacks; they are in `paired` alone.
    """

    reference: str
    tasks: tuple[str, ...]
    left_out_tasks: tuple[str, ...]
    paired: tuple[PairedDifference, ...]
    methods: tuple[DomainDifference, ...]
    incomplete_methods: dict[str, tuple[str, ...]]
    ranks: AverageRanks


def paired_differences(scores: Scores, reference: str = REFERENCE) -> list[PairedDifference]:
    """Return the differences to the reference, task by task and method by method.

    A t-test and not Wilcoxon's: of five seeds that one's least p-value is 0.06. Methods without a
    seed in common with the reference, and tasks without the reference, give no line.

    Args:
        scores: [task][method][seed]. None, NaN or infinite: the run diverged, and counts as 0.
    """
    paired = []
    for task, methods in scores.items():
        for method in methods:
            if method != reference and reference in methods:
                line = _pair(task, method, reference, methods)
                if line.seeds:
                    paired.append(line)
    return paired


def _pair(
    task: str, method: str, reference: str, methods: Mapping[str, Mapping[int, float | None]]
) -> PairedDifference:
    seeds = sorted(methods[method].keys() & methods[reference].keys())
    scores, diverged = _finite([methods[method][seed] for seed in seeds])
    reference_scores, reference_diverged = _finite([methods[reference][seed] for seed in seeds])
    differences = np.round(scores - reference_scores, _DECIMALS)
    return PairedDifference(
        task=task,
        method=method,
        reference=reference,
        seeds=tuple(seeds),
        differences=tuple(differences.tolist()),
        mean=_mean(differences),
        test=t_test(differences),
        effect_size=_effect_size(differences),
        diverged=diverged,
        reference_diverged=reference_diverged,
    )


def _finite(scores: Sequence[float | None]) -> tuple[Vector, int]:
    """Return the scores with 0 for those that are not finite, and how many those are."""
    values = np.array([math.nan if score is None else score for score in scores], dtype=float)
    diverged = ~np.isfinite(values)
    values[diverged] = 0
    return values, int(diverged.sum())


def _mean(values: Vector) -> float:
    return round(float(values.mean()), _DECIMALS) if len(values) else math.nan


def _deviation(values: Vector) -> float:
    """Return the sample's standard deviation, which is exactly 0 where all values are equal."""
    return float(values.std(ddof=1)) if np.ptp(values) else 0.0


def _effect_size(values: Vector) -> float | None:
    """Return mean / deviation (Cohen's d_z); None where there is no deviation."""
    deviation = _deviation(values) if len(values) > 1 else 0.0
    return _mean(values) / deviation if deviation else None


def t_test(values: Vector) -> TTest | None:
    """Return the t-test of the mean of values (n,); None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    return _t_test_from(_mean(values), _deviation(values) / math.sqrt(count), count - 1)


def _t_test_from(mean: float, error: float, degrees: float) -> TTest:
    """Return the t-test of a mean with its standard error and degrees of freedom.

    Without an error the interval is the mean alone, and p is 1 where that is 0, and else 0: the
    limits, which `scipy.stats.ttest_1samp` gives with warnings or not at all.
    """
    if error == 0:
        return TTest(Interval(mean, mean), 0.0 if mean else 1.0)
    low, high = stats.t.interval(_CONFIDENCE, degrees, loc=mean, scale=error)
    return TTest(
        Interval(float(low), float(high)), float(2 * stats.t.sf(abs(mean) / error, degrees))
    )


def compare_domain(scores: Scores, reference: str = REFERENCE, seed: int = 0) -> DomainComparison:
    """Return the comparison of all methods with the reference over the tasks of one domain.

    Methods of which a task is missing take no part in averages, ranks and Holm's correction: their
    mean would be that of other tasks.

    Args:
        scores: [task][method][seed], as `paired_differences` takes them. seed: of the bootstrap.

    Raises:
        ConfigError: no method has a seed in common with the reference on any task.
    """
    paired = paired_differences(scores, reference)
    if not paired:
        raise ConfigError(
            f"no task has a score of the reference {reference!r} and one of another method with"
            " the same seed; run both, or choose another reference"
        )
    tasks = _tasks(paired)
    return DomainComparison(
        reference=reference,
        tasks=tasks,
        left_out_tasks=tuple(task for task in scores if task not in tasks),
        paired=tuple(paired),
        methods=_domain_differences(_complete(paired), seed),
        incomplete_methods=_incomplete(scores, paired),
        ranks=average_ranks(paired),
    )


def _tasks(paired: Sequence[PairedDifference]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line.task for line in paired))


def _by_method(paired: Sequence[PairedDifference]) -> dict[str, dict[str, PairedDifference]]:
    """Return [method][task]."""
    lines: dict[str, dict[str, PairedDifference]] = {}
    for line in paired:
        lines.setdefault(line.method, {})[line.task] = line
    return lines


def _complete(paired: Sequence[PairedDifference]) -> dict[str, list[PairedDifference]]:
    """Return the lines of each method that has all tasks, in the order of the tasks."""
    tasks = _tasks(paired)
    return {
        method: [lines[task] for task in tasks]
        for method, lines in _by_method(paired).items()
        if len(lines) == len(tasks)
    }


def _incomplete(scores: Scores, paired: Sequence[PairedDifference]) -> dict[str, tuple[str, ...]]:
    """Return the tasks that a method lacks, for those that lack any."""
    lines = _by_method(paired)
    methods = dict.fromkeys(method for runs in scores.values() for method in runs)
    missing = {
        method: tuple(task for task in _tasks(paired) if task not in lines.get(method, {}))
        for method in methods
        if method != paired[0].reference
    }
    return {method: tasks for method, tasks in missing.items() if tasks}


def _domain_differences(
    complete: Mapping[str, Sequence[PairedDifference]], seed: int
) -> tuple[DomainDifference, ...]:
    fixed = {method: _fixed_tasks_test(lines) for method, lines in complete.items()}
    random = {method: _random_tasks_test(lines) for method, lines in complete.items()}
    fixed_holm = dict(zip(fixed, holm([_p_value(test) for test in fixed.values()]), strict=True))
    random_holm = dict(zip(random, holm([_p_value(test) for test in random.values()]), strict=True))
    differences = []
    for method, lines in complete.items():
        outcomes = [line.outcome for line in lines]
        difference = DomainDifference(
            method=method,
            mean=_mean(_means(lines)),
            fixed_tasks=fixed[method],
            random_tasks=random[method],
            bootstrap=_bootstrap_interval(lines, seed),
            fixed_tasks_holm=fixed_holm[method],
            random_tasks_holm=random_holm[method],
            effect_size=_effect_size(_means(lines)),
            wins=outcomes.count("win"),
            ties=outcomes.count("tie"),
            losses=outcomes.count("loss"),
        )
        differences.append(difference)
    return tuple(differences)


def _means(lines: Sequence[PairedDifference]) -> Vector:
    return np.array([line.mean for line in lines])


def _p_value(test: TTest | None) -> float | None:
    return test.p_value if test else None


def _fixed_tasks_test(lines: Sequence[PairedDifference]) -> TTest | None:
    """Return the t-test of the mean over given tasks; None where one has a single seed.

    The tasks' deviations differ, so the degrees of freedom are those of Welch and Satterthwaite.
    """
    squares = _squared_errors(lines)
    if squares is None:
        return None
    total = squares.sum()
    seeds = np.array([len(line.seeds) for line in lines])
    degrees = float(total**2 / (squares**2 / (seeds - 1)).sum()) if total else math.inf
    return _t_test_from(_mean(_means(lines)), math.sqrt(total) / len(lines), degrees)


def _random_tasks_test(lines: Sequence[PairedDifference]) -> TTest | None:
    """Return the t-test over the means of tasks; None for fewer than three.

    Tasks whose means happen to be closer than their seeds allow do not make it surer.
    """
    if len(lines) < _FEWEST_TASKS:
        return None
    means, squares = _means(lines), _squared_errors(lines)
    of_seeds = 0.0 if squares is None else math.sqrt(squares.sum()) / len(lines)
    error = max(_deviation(means) / math.sqrt(len(lines)), of_seeds)
    return _t_test_from(_mean(means), error, len(lines) - 1)


def _squared_errors(lines: Sequence[PairedDifference]) -> Vector | None:  # (tasks,)
    """Return the squares of the standard errors of tasks' means; None where one has one seed."""
    if any(len(line.seeds) < 2 for line in lines):
        return None
    deviations = np.array([_deviation(np.array(line.differences)) for line in lines])
    squares: Vector = deviations**2 / [len(line.seeds) for line in lines]
    return squares


def _bootstrap_interval(lines: Sequence[PairedDifference], seed: int) -> Interval | None:
    if len(lines) < 2 or any(len(line.seeds) < 2 for line in lines):
        return None
    means = hierarchical_bootstrap([line.differences for line in lines], seed)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.round(np.quantile(means, [tail, 1 - tail]), _DECIMALS)
    return Interval(float(low), float(high))


def hierarchical_bootstrap(
    differences: Sequence[Sequence[float]], seed: int = 0, resamples: int = _RESAMPLES
) -> Vector:  # (resamples,)
    """Return means over tasks drawn with replacement, and over seeds drawn within each of them.

    `scipy.stats.bootstrap` draws on one level only. A task that is drawn twice gets other seeds
    each time. The generator is new in every call, so what a method gets does not depend on the
    others.

    Args:
        differences: one row per task, which may differ in their numbers of seeds.
    """
    generator = np.random.default_rng(seed)
    counts = np.array([len(row) for row in differences])
    padded = np.zeros((len(counts), counts.max()))
    for row, values in zip(padded, differences, strict=True):
        row[: len(values)] = values
    tasks = generator.integers(len(counts), size=(resamples, len(counts)))
    drawn_counts = counts[tasks]
    uniform = generator.random((*tasks.shape, padded.shape[1]))
    drawn_seeds = (uniform * drawn_counts[..., None]).astype(int)
    drawn = padded[tasks[..., None], drawn_seeds]  # (resamples, tasks, seeds)
    drawn[np.arange(padded.shape[1]) >= drawn_counts[..., None]] = 0
    means: Vector = (drawn.sum(axis=2) / drawn_counts).mean(axis=1)
    return means


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values corrected for their number by Holm's step-down procedure.

    None stays None and is not counted. SciPy corrects false discovery rates alone.
    """
    known = [(p_value, index) for index, p_value in enumerate(p_values) if p_value is not None]
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for position, (p_value, index) in enumerate(sorted(known)):
        highest = max(highest, min(1.0, p_value * (len(known) - position)))
        corrected[index] = highest
    return corrected


def average_ranks(paired: Sequence[PairedDifference]) -> AverageRanks:
    """Return the mean ranks of the reference and of all methods that have every task.

    Ranks are those of the mean differences to the reference, 0 being its own. So methods with fewer
    seeds are compared by the seeds that they have. The tasks may be of several domains.

    Source: J. Demšar, "Statistical comparisons of classifiers over multiple data sets", JMLR 7,
    2006, section 3.2.2.
    """
    complete = _complete(paired)
    names = [*dict.fromkeys(line.reference for line in paired), *complete]
    columns = [np.zeros(len(_tasks(paired))), *(_means(lines) for lines in complete.values())]
    means = np.stack(columns, axis=1)  # (tasks, methods)
    ranks = stats.rankdata(-means, axis=1)
    return AverageRanks(
        ranks=dict(zip(names, ranks.mean(axis=0).tolist(), strict=True)),
        tasks=len(means),
        friedman_p=_friedman_p(means),
        critical_difference=critical_difference(len(names), len(means)),
    )


def _friedman_p(means: Vector) -> float | None:  # (tasks, methods)
    tasks, methods = means.shape
    if tasks < 2 or methods < 3:
        return None
    if not np.ptp(means, axis=1).any():  # every task a tie of all: 0 / 0
        return 1.0
    return float(stats.friedmanchisquare(*means.T).pvalue)


@cache  # half a second each
def critical_difference(methods: int, tasks: int) -> float | None:
    """Return Nemenyi's critical difference of mean ranks at 5 %; None for fewer than two of either.

    Source: Demšar 2006, section 3.2.2, where the table of q is that of the studentized range / √2.
    """
    if methods < 2 or tasks < 2:
        return None
    quantile = stats.studentized_range.ppf(_CONFIDENCE, methods, math.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(methods * (methods + 1) / (6 * tasks)))
