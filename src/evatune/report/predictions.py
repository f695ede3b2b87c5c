"""What is known before training and may predict its end: κ and the participation ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from evatune.finetune.comparison.rate_rule import RATE_FACTOR
from evatune.finetune.comparison.statistics import TTest, t_test
from evatune.finetune.comparison.tuned_cells import Group
from evatune.finetune.recipe import REFERENCE
from evatune.report.evidence import SIGNIFICANT, Verdict, score_differences
from evatune.report.text import with_minus
from evatune.utils.extras import extras

with extras(__name__):
    from scipy.stats import spearmanr

_FEWEST_PAIRS = 4  # of a correlation


def predictions(groups: Sequence[Group], subjects: Sequence[str]) -> list[Verdict]:
    """Return what κ and PR predict of these methods, but for what needs more tasks."""
    tasks = sum(len(group.tasks) for group in groups)
    told = []
    if tasks > 1:
        told.append(kappa_verdict(groups))
    if tasks >= _FEWEST_PAIRS:
        told += [participation_verdict(groups, subject) for subject in subjects]
    return told


def kappa_verdict(groups: Sequence[Group]) -> Verdict:
    """Return whether κ predicts the ratio of LoRA's best learning rate to the method's.

    The correlation is taken within tasks, whose methods share LoRA's rate, and tested over tasks.
    """
    claim = "Does κ predict the ratio of best rates?"
    of_tasks = [_kappas(group, task) for group in groups for task in group.tasks]
    correlations = [_correlation(pairs, 3) for pairs in of_tasks]
    coefficients = [correlation.statistic for correlation in correlations if correlation]
    test = t_test(np.array(coefficients))
    if test is None:
        count = sum(map(len, of_tasks))
        return Verdict(
            claim, "unknown", f"{count} cells have a κ and a best rate; it takes 3 on two tasks."
        )
    off = [ratio / kappa for pairs in of_tasks for kappa, ratio in pairs]
    limit = RATE_FACTOR * 1.001  # a step of the grid, to rounding
    near = sum(1 / limit <= factor <= limit for factor in off)
    return Verdict(
        claim,
        _predicts(test),
        f"Within {len(coefficients)} tasks the rank correlation over methods of κ with"
        f" {REFERENCE}'s best rate over the method's is {_mean_correlation(coefficients, test)};"
        f" over {len(off)} cells the ratio is {median(off):.2f} κ in the median, and within a step"
        f" of the grid of κ in {near}.",
    )


def _kappas(group: Group, task: str) -> list[tuple[float, float]]:
    """Return κ and LoRA's best rate over the method's, for each method that has both."""
    reference = group.cell(task, REFERENCE)
    if reference is None or not reference.rate:
        return []
    pairs = []
    for cell in group.cells_on(task):
        if cell is not reference and cell.kappa and cell.rate:
            pairs.append((cell.kappa, reference.rate / cell.rate))
    return pairs


def participation_verdict(groups: Sequence[Group], subject: str) -> Verdict:
    """Return whether the inputs' participation ratio tells where EVA gains.

    The correlation is taken within domains, which differ in both, and tested over domains; of a
    single one over its tasks.
    """
    claim = f"Does PR predict the gain of {subject}?"
    pairs = [_gains_by_participation(group, subject) for group in groups]
    correlations = [_correlation(of_domain, _FEWEST_PAIRS) for of_domain in pairs]
    known = [correlation for correlation in correlations if correlation]
    if not known:
        return Verdict(claim, "unknown", f"{sum(map(len, pairs))} tasks have a PR and a gain.")
    what = f"the rank correlation of the inputs' participation ratio with the gain over {REFERENCE}"
    if len(known) == 1:
        (correlation,) = known
        outcome = _predicts(correlation)
        of_tasks = f"{_figure(correlation.statistic)} (p = {correlation.pvalue:.2g})"
        return Verdict(claim, outcome, f"Over {max(map(len, pairs))} tasks {what} is {of_tasks}.")
    coefficients = [correlation.statistic for correlation in known]
    test = t_test(np.array(coefficients))
    assert test is not None  # of two or more
    return Verdict(
        claim,
        _predicts(test),
        f"Within {len(known)} domains {what} is {_mean_correlation(coefficients, test)}.",
    )


def _gains_by_participation(group: Group, subject: str) -> list[tuple[float, float]]:
    """Return the participation ratio and the gain over LoRA of each task that has both."""
    comparison = score_differences([group])
    paired = comparison.paired if comparison else ()
    gains = {line.task: line.mean for line in paired if line.method == subject}
    return [
        (cell.participation, gains[cell.task])
        for cell in group.of(subject)
        if cell.participation is not None and cell.task in gains
    ]


def _mean_correlation(coefficients: Sequence[float], test: TTest) -> str:
    low, high = max(-1.0, test.interval.low), min(1.0, test.interval.high)
    return f"{_figure(fmean(coefficients))} in the mean [{_figure(low)}, {_figure(high)}]"


def _figure(correlation: float) -> str:
    return with_minus(f"{correlation:+.2f}")


def _correlation(pairs: list[tuple[float, float]], fewest: int) -> Any:
    """Return Spearman's correlation; None for fewer pairs, or where one side is constant."""
    if len(pairs) < fewest or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    correlation = spearmanr(*zip(*pairs, strict=True))
    return correlation if math.isfinite(correlation.statistic) else None


def _predicts(found: Any) -> str:
    """Return the answer of a correlation, SciPy's, or of the t-test of several."""
    if isinstance(found, TTest):
        side = found.interval.outcome
    elif found.pvalue >= SIGNIFICANT:
        side = "tie"
    else:
        side = "win" if found.statistic > 0 else "loss"
    return {"tie": "no evidence", "win": "yes", "loss": "the other way round"}[side]
