"""Verdicts of a tuned comparison on the paper's claims, in sentences made by rule.

A win is an interval above 0, a loss one below, a tie one that holds 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from evatune.errors import ConfigError
from evatune.finetune.comparison.rate_rule import STEPS_PER_DECADE
from evatune.finetune.comparison.statistics import (
    DomainComparison,
    DomainDifference,
    TTest,
    compare_domain,
    t_test,
)
from evatune.finetune.comparison.tuned_cells import FULL, LOWER_RATES, Group, Values, base_name
from evatune.finetune.methods import METHODS
from evatune.finetune.recipe import REFERENCE
from evatune.report.text import with_minus
from evatune.utils.extras import extras

with extras(__name__):
    from scipy.stats import spearmanr

SUBJECT = "eva"
_OF_PAPER = "eva-paper-centered"  # directions of the covariance, unit rows
_SIGNIFICANT = 0.05
_FACTOR = 10 ** (1 / STEPS_PER_DECADE)  # between the rates of a grid
_DIRECTIONS = (  # claim, EVA's directions, random ones
    ("Better directions at the same first step?", _OF_PAPER, "eva-paper-random"),
    ("Better directions where A is frozen?", "eva-fa", "lora-fa"),
)
_PRECISE = 0.01  # half of an interval of scores
_FEWEST_PAIRS = 4  # of a correlation


@dataclass(frozen=True)
class Verdict:
    """An answer to one claim, with its figures."""

    claim: str
    outcome: str
    text: str


def score_differences(groups: Sequence[Group]) -> DomainComparison | None:
    """Return the statistics of the test scores of one or several domains."""
    return compared(all_tasks(groups, Group.test_scores))


def compared(values: Values, reference: str = REFERENCE) -> DomainComparison | None:
    """Return the statistics of the values; None where nothing shares a seed with the reference."""
    try:
        return compare_domain(values, reference)
    except ConfigError:
        return None


def all_tasks(groups: Sequence[Group], of: Callable[[Group], Values]) -> Values:
    """Return the values of several domains as those of one."""
    return {
        _task_name(group, task, groups): by_method
        for group in groups
        for task, by_method in of(group).items()
    }


def _task_name(group: Group, task: str, groups: Sequence[Group]) -> str:
    return task if len(groups) == 1 else f"{group.domain}/{task}"


def verdicts(groups: Sequence[Group]) -> list[Verdict]:
    """Return the verdicts on the paper's claims over the tasks of one or several domains."""
    of_default, of_paper = _by_default(groups), _as_in_the_paper(groups)
    if not of_default and not of_paper:
        return [*_of_others(groups), *_directions(groups)]
    return [
        *of_default,
        *of_paper,
        *_directions(groups),
        *_predictions(groups),
    ]


def _by_default(groups: Sequence[Group]) -> list[Verdict]:
    """Return the claims for EVA's defaults; nothing where nobody ran them."""
    if not any(group.of(SUBJECT) for group in groups):
        return []
    return [
        _claim(groups, "Faster convergence?", Group.steps_saved, _saved_text),
        _claim(groups, "Higher average?", Group.test_scores, _score_text),
        *_against_best(groups, "Above the best competitor?", SUBJECT),
        _claim(groups, "Fewer parameters?", Group.parameters_saved, _parameters_text),
        _precision(groups),
        _lower_rates(groups, "Better at lower rates?", SUBJECT),
        _over_rates(groups, "Higher, without tuning?", SUBJECT),
    ]


def _of_others(groups: Sequence[Group]) -> list[Verdict]:
    """Return the claims of speed and scores for every method, competitors first."""
    comparison = score_differences(groups)
    if comparison is None or not comparison.methods:
        text = f"No method has tested runs on every task with a seed of {REFERENCE}'s."
        return [Verdict("Higher average?", "unknown", text)]
    claims: list[Verdict] = []
    methods = [line.method for line in comparison.methods]
    for method in sorted(methods, key=lambda method: not _is_competitor(method)):
        faster, higher = f"Faster with {method}?", f"Higher with {method}?"
        claims += [
            _claim(groups, faster, Group.steps_saved, _saved_text, method),
            _claim(groups, higher, Group.test_scores, _score_text, method),
        ]
    return claims


def _claim(
    groups: Sequence[Group],
    claim: str,
    of: Callable[[Group], Values],
    describe: Callable[[str, float], str],
    subject: str = SUBJECT,
) -> Verdict:
    line = _line(compared(all_tasks(groups, of)), subject)
    if line is None:
        return Verdict(claim, "unknown", _missing(subject))
    text = f"{describe(subject, line.mean)} {_evidence(line)}"
    return Verdict(claim, _outcome(line.fixed_tasks), text)


def _missing(subject: str = SUBJECT) -> str:
    return (
        f"There are no tested runs of {subject} and of {REFERENCE} with a seed in common on every"
        " task."
    )


def _saved_text(subject: str, mean: float) -> str:
    side = "sooner" if mean >= 0 else "later"
    return (
        f"Of its final validation loss and {REFERENCE}'s, {subject} reaches the larger one"
        f" {_size(mean)} % of a run {side} than {REFERENCE} does."
    )


def _score_text(subject: str, mean: float) -> str:
    return f"{subject} is {_apart(mean)} {REFERENCE} in score on test examples."


def _parameters_text(subject: str, mean: float) -> str:
    side = "fewer" if mean >= 0 else "more"
    return f"{subject} trains {_size(mean)} % {side} parameters than {REFERENCE}."


def _apart(mean: float) -> str:
    return f"{_size(mean)} points {'above' if mean >= 0 else 'below'}"


def _size(share: float) -> str:
    return f"{100 * abs(share):.1f}"


def _against_best(groups: Sequence[Group], claim: str, subject: str) -> list[Verdict]:
    """Return the claim against the competitor with the best score; nothing where none ran."""
    if not any(_is_competitor(method) for group in groups for method in group.methods):
        return []
    scores = all_tasks(groups, Group.test_scores)
    comparison = compared(scores)
    lines = comparison.methods if comparison else ()
    rivals = [line for line in lines if _is_competitor(line.method)]
    if _line(comparison, subject) is None or not rivals:
        return [Verdict(claim, "unknown", "There is no competitor that has every task.")]
    best = max(rivals, key=lambda line: line.mean).method
    line = _line(compared(scores, best), subject)
    if line is None:
        return [Verdict(claim, "unknown", f"{subject} and {best} have no seed in common.")]
    text = (
        f"{subject} is {_apart(line.mean)} {best}, the competitor with the highest mean score on"
        " these same test examples, a choice in that one's favor."
    )
    return [Verdict(claim, _outcome(line.fixed_tasks), f"{text} {_evidence(line)}")]


def _is_competitor(method: str) -> bool:
    """Return whether a method competes with EVA; one that is no longer registered does."""
    known = METHODS.get(base_name(method))
    return known is None or known.role == "competitor"


def _precision(groups: Sequence[Group]) -> Verdict:
    """Return whether the scores would show a gain of half of what an adapter can gain at most."""
    claim = "Precise enough to tell?"
    comparison = score_differences(groups)
    line, full = _line(comparison, SUBJECT), _line(comparison, FULL)
    if line is None:
        return Verdict(claim, "unknown", _missing())
    if line.fixed_tasks is None:
        return Verdict(claim, _outcome(None), "A mean of one seed has no interval.")
    half_width = line.fixed_tasks.interval.half_width
    width = f"The mean difference in score is known to ± {_size(half_width)} points"
    if full is None:
        outcome = "yes" if half_width <= _PRECISE else "unknown"
        return Verdict(claim, outcome, f"{width}; not every task has {FULL} fine-tuning.")
    outcome = "yes" if half_width <= max(_PRECISE, full.mean / 2) else "no"
    return Verdict(
        claim,
        outcome,
        f"{width}, and {FULL} fine-tuning is {_apart(full.mean)} {REFERENCE}: half of that, or"
        f" {_size(_PRECISE)}, is narrow enough.",
    )


def _lower_rates(groups: Sequence[Group], claim: str, subject: str) -> Verdict:
    """Return whether the subject is the better one where the rate is too low for the reference."""
    line = _line(compared(all_tasks(groups, Group.gained_at_lower_rates)), subject)
    if line is None:
        text = f"{subject} and {REFERENCE} lack {LOWER_RATES} rates below {REFERENCE}'s best."
        return Verdict(claim, "unknown", text)
    factors = " and ".join(f"{_FACTOR**step:.1f}" for step in range(1, LOWER_RATES + 1))
    text = (
        f"At rates {factors} times below {REFERENCE}'s best, {subject}'s validation loss falls by"
        f" {_size(line.mean)} % {'more' if line.mean >= 0 else 'less'} than {REFERENCE}'s, of what"
        f" {REFERENCE}'s falls by at its best."
    )
    return _of_rates(claim, text, line)


def _over_rates(groups: Sequence[Group], claim: str, subject: str) -> Verdict:
    """Return whether the subject is the better one at rates that nobody chose."""
    line = _line(compared(all_tasks(groups, Group.gained_over_rates)), subject)
    if line is None:
        text = f"{subject} and {REFERENCE} have not two rates in common on every task."
        return Verdict(claim, "unknown", text)
    text = (
        f"At the same rate, {subject} is {_apart(line.mean)} {REFERENCE} in score on validation"
        " examples, in the mean over all rates that both searches ran."
    )
    return _of_rates(claim, text, line)


def _of_rates(claim: str, text: str, line: DomainDifference) -> Verdict:
    """Return the verdict by the interval over tasks: most rates have a single seed."""
    if line.random_tasks is None:
        return Verdict(claim, "unknown (fewer than three tasks)", text)
    outcome = _outcome(line.random_tasks)
    tasks = f"On other tasks like these: {outcome}{interval_text(line.random_tasks)}."
    return Verdict(claim, outcome, f"{text} {tasks}")


def _as_in_the_paper(groups: Sequence[Group]) -> list[Verdict]:
    """Return the claims of scores and speed for the paper's settings, where every task has them."""
    if _line(score_differences(groups), _OF_PAPER) is None:
        return []
    settings = "with the paper's settings?"
    claims: list[tuple[str, Callable[[Group], Values], Callable[[str, float], str]]] = [
        (f"Faster, {settings}", Group.steps_saved, _saved_text),
        (f"Higher, {settings}", Group.test_scores, _score_text),
    ]
    return [
        *(_claim(groups, *claim, _OF_PAPER) for claim in claims),
        *_against_best(groups, f"Above the best competitor, {settings}", _OF_PAPER),
        _lower_rates(groups, f"Better at lower rates, {settings}", _OF_PAPER),
        _over_rates(groups, f"Higher without tuning, {settings}", _OF_PAPER),
        _validation_chooses(groups),
    ]


def _validation_chooses(groups: Sequence[Group]) -> Verdict:
    """Return what is gained by taking EVA on the tasks where validation prefers it to LoRA."""
    claim = "Higher, where validation chooses?"
    scores: Values = {}
    kept = 0
    for group in groups:
        for cell in group.of(_OF_PAPER):
            reference = group.cell(cell.task, REFERENCE)
            if reference is None:
                continue
            prefers = cell.validation_loss < reference.validation_loss
            kept += not prefers
            scores[_task_name(group, cell.task, groups)] = {
                REFERENCE: dict(reference.scores),
                _OF_PAPER: dict((cell if prefers else reference).scores),
            }
    line = _line(compared(scores), _OF_PAPER)
    if line is None:
        return Verdict(claim, "unknown", _missing(_OF_PAPER))
    text = (
        f"The tuning seeds' validation loss is lower with {_OF_PAPER} than with {REFERENCE} on"
        f" {len(scores) - kept} of {len(scores)} tasks. Who takes it there, and {REFERENCE}"
        f" elsewhere, is {_apart(line.mean)} {REFERENCE} in score on test examples, the choice"
        " being given."
    )
    chosen = replace(line, ties=line.ties - kept)
    text += f" {_evidence(chosen)}"
    if kept:
        text = f"{text.removesuffix('.')}, {kept} left to {REFERENCE}."
    return Verdict(claim, _outcome(line.fixed_tasks), text)


def _directions(groups: Sequence[Group]) -> list[Verdict]:
    """Return whether EVA's directions are better than random ones, all else being equal.

    Nothing where no task has runs of both.
    """
    scores = all_tasks(groups, Group.test_scores)
    claims = []
    for claim, subject, reference in _DIRECTIONS:
        line = _line(compared(scores, reference), subject)
        if line is not None:
            text = f"{subject} is {_apart(line.mean)} {reference} in score on test examples."
            claims.append(Verdict(claim, _outcome(line.fixed_tasks), f"{text} {_evidence(line)}"))
    return claims


def _line(comparison: DomainComparison | None, method: str) -> DomainDifference | None:
    lines = comparison.methods if comparison else ()
    return next((line for line in lines if line.method == method), None)


def _evidence(line: DomainDifference) -> str:
    parts = [f"On these tasks: {_outcome(line.fixed_tasks)}{interval_text(line.fixed_tasks)}"]
    if line.random_tasks is not None:
        parts.append(
            f"on other tasks like these: {_outcome(line.random_tasks)}"
            f"{interval_text(line.random_tasks)}"
        )
    of_tasks = f"of tasks {line.wins} won, {line.ties} tied, {line.losses} lost"
    return f"{'; '.join(parts)}{_uncorrected(line)}; {of_tasks}."


def _uncorrected(line: DomainDifference) -> str:
    """Return that a win or loss is not significant by Holm's p over all methods; "" where it is."""
    p_value = line.fixed_tasks_holm
    if _outcome(line.fixed_tasks) == "tie" or p_value is None or p_value < _SIGNIFICANT:
        return ""
    return f"; not significant among all methods (Holm's p = {p_value:.2g})"


def interval_text(test: TTest | None) -> str:
    """Return a 95 % interval in hundredths: " [−0.4, +1.2]"; nothing without one."""
    if test is None:
        return ""
    return f" [{signed(test.interval.low)}, {signed(test.interval.high)}]"


def _outcome(test: TTest | None) -> str:
    return "unknown (one seed)" if test is None else test.interval.outcome


def signed(share: float) -> str:
    """Return a share in hundredths: "−0.4"."""
    return with_minus(f"{100 * share:+.1f}")


def _predictions(groups: Sequence[Group]) -> list[Verdict]:
    """Return what κ and PR predict; nothing of what it takes more tasks to tell."""
    tasks = sum(len(group.tasks) for group in groups)
    told = []
    if tasks > 1:
        told.append(kappa_verdict(groups))
    if tasks >= _FEWEST_PAIRS:
        for subject in (SUBJECT, _OF_PAPER):
            if any(group.of(subject) for group in groups):
                told.append(participation_verdict(groups, subject))
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
    limit = _FACTOR * 1.001  # a step of the grid, to rounding
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
    elif found.pvalue >= _SIGNIFICANT:
        side = "tie"
    else:
        side = "win" if found.statistic > 0 else "loss"
    return {"tie": "no evidence", "win": "yes", "loss": "the other way round"}[side]
