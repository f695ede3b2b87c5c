"""What a verdict rests on: differences from LoRA, and the words for their intervals.

A win is an interval above 0, a loss one below, a tie one that holds 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evatune.errors import ConfigError
from evatune.finetune.comparison.statistics import (
    DomainComparison,
    DomainDifference,
    TTest,
    compare_domain,
)
from evatune.finetune.comparison.tuned_cells import Group, Values
from evatune.finetune.recipe import REFERENCE
from evatune.report.text import with_minus

SIGNIFICANT = 0.05


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
        task_name(group, task, groups): by_method
        for group in groups
        for task, by_method in of(group).items()
    }


def task_name(group: Group, task: str, groups: Sequence[Group]) -> str:
    """Return a task's name among those of these groups, with its domain if they are several."""
    return task if len(groups) == 1 else f"{group.domain}/{task}"


def line_of(comparison: DomainComparison | None, method: str) -> DomainDifference | None:
    """Return the line of a method; None where it lacks a task."""
    lines = comparison.methods if comparison else ()
    return next((line for line in lines if line.method == method), None)


def outcome_of(test: TTest | None) -> str:
    """Return win, tie or loss."""
    return "unknown (one seed)" if test is None else test.interval.outcome


def evidence(line: DomainDifference) -> str:
    """Return a sentence of outcomes and intervals, on these tasks and on others like them."""
    parts = [f"On these tasks: {outcome_of(line.fixed_tasks)}{interval_text(line.fixed_tasks)}"]
    if line.random_tasks is not None:
        parts.append(
            f"on other tasks like these: {outcome_of(line.random_tasks)}"
            f"{interval_text(line.random_tasks)}"
        )
    of_tasks = f"of tasks {line.wins} won, {line.ties} tied, {line.losses} lost"
    return f"{'; '.join(parts)}{_uncorrected(line)}; {of_tasks}."


def _uncorrected(line: DomainDifference) -> str:
    """Return that a win or loss is not significant by Holm's p over all methods; "" where it is."""
    p_value = line.fixed_tasks_holm
    if outcome_of(line.fixed_tasks) == "tie" or p_value is None or p_value < SIGNIFICANT:
        return ""
    return f"; not significant among all methods (Holm's p = {p_value:.2g})"


def interval_text(test: TTest | None) -> str:
    """Return a 95 % interval in hundredths: " [−0.4, +1.2]"; nothing without one."""
    if test is None:
        return ""
    return f" [{signed(test.interval.low)}, {signed(test.interval.high)}]"


def difference_text(mean: float, test: TTest | None) -> str:
    """Return a difference in hundredths with its 95 % interval: "+0.4 [−0.4, +1.2]"."""
    return signed(mean) + interval_text(test)


def signed(share: float) -> str:
    """Return a share in hundredths: "−0.4"."""
    return with_minus(f"{100 * share:+.1f}")
