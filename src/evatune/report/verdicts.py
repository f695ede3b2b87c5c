"""Verdicts of a tuned comparison on the paper's claims, in sentences made by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from evatune.finetune.comparison.rate_rule import RATE_FACTOR
from evatune.finetune.comparison.statistics import DomainDifference
from evatune.finetune.comparison.tuned_cells import FULL, LOWER_RATES, Group, Values, base_name
from evatune.finetune.methods import METHODS
from evatune.finetune.recipe import REFERENCE
from evatune.report.evidence import (
    Verdict,
    all_tasks,
    compared,
    evidence,
    interval_text,
    line_of,
    outcome_of,
    score_differences,
    task_name,
)
from evatune.report.predictions import predictions

SUBJECT = "eva"
_OF_PAPER = "eva-paper-centered"  # directions of the covariance, unit rows
_DIRECTIONS = (  # claim, EVA's directions, random ones
    ("Better directions at the same first step?", _OF_PAPER, "eva-paper-random"),
    ("Better directions where A is frozen?", "eva-fa", "lora-fa"),
)
_PRECISE = 0.01  # half of an interval of scores


def verdicts(groups: Sequence[Group]) -> list[Verdict]:
    """Return the verdicts on the paper's claims over the tasks of one or several domains."""
    of_default, of_paper = _by_default(groups), _as_in_the_paper(groups)
    if not of_default and not of_paper:
        return [*_of_others(groups), *_directions(groups)]
    return [
        *of_default,
        *of_paper,
        *_directions(groups),
        *predictions(groups, [name for name in (SUBJECT, _OF_PAPER) if _ran(groups, name)]),
    ]


def _by_default(groups: Sequence[Group]) -> list[Verdict]:
    """Return the claims for EVA's defaults; nothing where nobody ran them."""
    if not _ran(groups, SUBJECT):
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


def _ran(groups: Sequence[Group], method: str) -> bool:
    return any(group.of(method) for group in groups)


def _claim(
    groups: Sequence[Group],
    claim: str,
    of: Callable[[Group], Values],
    describe: Callable[[str, float], str],
    subject: str = SUBJECT,
) -> Verdict:
    line = line_of(compared(all_tasks(groups, of)), subject)
    if line is None:
        return Verdict(claim, "unknown", _missing(subject))
    text = f"{describe(subject, line.mean)} {evidence(line)}"
    return Verdict(claim, outcome_of(line.fixed_tasks), text)


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
    if line_of(comparison, subject) is None or not rivals:
        return [Verdict(claim, "unknown", "There is no competitor that has every task.")]
    best = max(rivals, key=lambda line: line.mean).method
    line = line_of(compared(scores, best), subject)
    if line is None:
        return [Verdict(claim, "unknown", f"{subject} and {best} have no seed in common.")]
    text = (
        f"{subject} is {_apart(line.mean)} {best}, the competitor with the highest mean score on"
        " these same test examples, a choice in that one's favor."
    )
    return [Verdict(claim, outcome_of(line.fixed_tasks), f"{text} {evidence(line)}")]


def _is_competitor(method: str) -> bool:
    """Return whether a method competes with EVA; one that is no longer registered does."""
    known = METHODS.get(base_name(method))
    return known is None or known.role == "competitor"


def _precision(groups: Sequence[Group]) -> Verdict:
    """Return whether the scores would show a gain of half of what an adapter can gain at most."""
    claim = "Precise enough to tell?"
    comparison = score_differences(groups)
    line, full = line_of(comparison, SUBJECT), line_of(comparison, FULL)
    if line is None:
        return Verdict(claim, "unknown", _missing())
    if line.fixed_tasks is None:
        return Verdict(claim, outcome_of(None), "A mean of one seed has no interval.")
    half_width = line.fixed_tasks.interval.half_width
    width = f"The mean difference in score is known to ± {_size(half_width)} points"
    if full is None:
        outcome = "yes" if half_width <= _PRECISE else "unknown"
        return Verdict(claim, outcome, f"{width}; not every task has {FULL} fine-tuning.")
    outcome = "yes" if half_width <= max(_PRECISE, full.mean / 2) else "no"
    return Verdict(
        claim,
        outcome,
        f"{width}, and {FULL} fine-tuning is {_apart(full.mean)} {REFERENCE}; half of that is"
        f" precise enough, and so are {_size(_PRECISE)} points.",
    )


def _lower_rates(groups: Sequence[Group], claim: str, subject: str) -> Verdict:
    """Return whether the subject is the better one where the rate is too low for the reference."""
    line = line_of(compared(all_tasks(groups, Group.gained_at_lower_rates)), subject)
    if line is None:
        text = f"{subject} and {REFERENCE} lack {LOWER_RATES} rates below {REFERENCE}'s best."
        return Verdict(claim, "unknown", text)
    factors = " and ".join(f"{RATE_FACTOR**step:.1f}" for step in range(1, LOWER_RATES + 1))
    text = (
        f"At rates {factors} times below {REFERENCE}'s best, {subject}'s validation loss falls by"
        f" {_size(line.mean)} % {'more' if line.mean >= 0 else 'less'} than {REFERENCE}'s, of what"
        f" {REFERENCE}'s falls by at its best."
    )
    return _of_rates(claim, text, line)


def _over_rates(groups: Sequence[Group], claim: str, subject: str) -> Verdict:
    """Return whether the subject is the better one at rates that nobody chose."""
    line = line_of(compared(all_tasks(groups, Group.gained_over_rates)), subject)
    if line is None:
        text = f"{subject} and {REFERENCE} do not have two rates in common on every task."
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
    outcome = outcome_of(line.random_tasks)
    tasks = f"On other tasks like these: {outcome}{interval_text(line.random_tasks)}."
    return Verdict(claim, outcome, f"{text} {tasks}")


def _as_in_the_paper(groups: Sequence[Group]) -> list[Verdict]:
    """Return the claims of scores and speed for the paper's settings, where every task has them."""
    if line_of(score_differences(groups), _OF_PAPER) is None:
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
            scores[task_name(group, cell.task, groups)] = {
                REFERENCE: dict(reference.scores),
                _OF_PAPER: dict((cell if prefers else reference).scores),
            }
    line = line_of(compared(scores), _OF_PAPER)
    if line is None:
        return Verdict(claim, "unknown", _missing(_OF_PAPER))
    text = (
        f"The tuning seeds' validation loss is lower with {_OF_PAPER} than with {REFERENCE} on"
        f" {len(scores) - kept} of {len(scores)} tasks. Who takes it there, and {REFERENCE}"
        f" elsewhere, is {_apart(line.mean)} {REFERENCE} in score on test examples, the choice"
        " being given."
    )
    chosen = replace(line, ties=line.ties - kept)
    text += f" {evidence(chosen)}"
    if kept:
        text = f"{text.removesuffix('.')}, {kept} left to {REFERENCE}."
    return Verdict(claim, outcome_of(line.fixed_tasks), text)


def _directions(groups: Sequence[Group]) -> list[Verdict]:
    """Return whether EVA's directions are better than random ones, all else being equal.

    Nothing where no task has runs of both.
    """
    scores = all_tasks(groups, Group.test_scores)
    claims = []
    for claim, subject, reference in _DIRECTIONS:
        line = line_of(compared(scores, reference), subject)
        if line is not None:
            text = f"{subject} is {_apart(line.mean)} {reference} in score on test examples."
            claims.append(Verdict(claim, outcome_of(line.fixed_tasks), f"{text} {evidence(line)}"))
    return claims
