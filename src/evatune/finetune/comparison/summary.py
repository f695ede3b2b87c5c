"""A comparison in figures: per task, method and learning rate, mean and deviation over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.finetune.comparison.curves import KnownPoint, mean_curve
from evatune.finetune.comparison.grid import Run
from evatune.finetune.metrics import read_metrics

Key = tuple[str, str, float]  # task, method, learning rate
_MEASURED = ("score", "eval_loss", "trainable_parameters", "init_seconds", "train_seconds")


@dataclass(frozen=True)
class MeanStd:
    """Mean over seeds, and the sample's standard deviation; None for a single seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class MethodSummary:
    """A method at one learning rate on one task, over seeds."""

    task: str
    method: str
    learning_rate: float
    seeds: int
    score: MeanStd
    eval_loss: MeanStd
    steps_to_target: MeanStd | None  # None unless every seed got there
    trainable_parameters: MeanStd
    # norm of the gradient of all B at step 1; None without an adapter
    first_gradient_b: MeanStd | None
    init_seconds: MeanStd
    train_seconds: MeanStd
    curve: list[KnownPoint]  # means
    scores: dict[int, float]  # by seed
    best: bool  # of smallest mean loss on this task's validation examples


@dataclass(frozen=True)
class Comparison:
    """All lines, task by task, and the evaluation loss to reach on each task."""

    lines: list[MethodSummary]
    targets: dict[str, float]

    def averages(self) -> dict[str, float]:
        """Return each method's mean over the tasks of its score at its best rate.

        Methods that are not done on every task are left out.
        """
        scores: dict[str, list[float]] = {}
        for line in self.lines:
            if line.best:
                scores.setdefault(line.method, []).append(line.score.mean)
        return {
            method: _mean(values)
            for method, values in scores.items()
            if len(values) == len(self.targets)
        }


@dataclass(frozen=True)
class _FinishedRun:
    folder: Path
    seed: int
    result: dict[str, Any]

    @property
    def loss(self) -> float:
        """After training, on the examples that were evaluated while training."""
        validation = self.result["validation"]
        loss: float = self.result["eval_loss"] if validation is None else validation["loss"]
        return loss


def summarize(runs: Sequence[Run], target_loss: float | None = None) -> Comparison:
    """Return one line per task, method and learning rate from the runs that are done.

    Args:
        target_loss: evaluation loss to reach. Default: per task what every seed of the first method
            reached that did not diverge, at its best rate.
    """
    groups = _finished_by_key(runs)
    best = _best_rates(groups)
    targets: dict[str, float] = {}
    for (task, method), rate in best.items():
        if task not in targets:  # the first method
            losses = [run.loss for run in groups[task, method, rate]]
            reached = max(filter(math.isfinite, losses), default=math.nan)
            targets[task] = reached if target_loss is None else target_loss
    lines = []
    for key, group in groups.items():
        task, method, rate = key
        is_best = best[task, method] == rate
        lines.append(_summary(key, group, targets[task], is_best))
    return Comparison(sorted(lines, key=lambda line: line.task), targets)


def _finished_by_key(runs: Sequence[Run]) -> dict[Key, list[_FinishedRun]]:
    groups: dict[Key, list[_FinishedRun]] = {}
    for run in runs:
        result = run.result
        if result is not None:
            recipe = run.recipe
            key = recipe.task, recipe.method, recipe.training.learning_rate
            groups.setdefault(key, []).append(_FinishedRun(run.folder, recipe.seed, result))
    return groups


def _best_rates(groups: Mapping[Key, list[_FinishedRun]]) -> dict[tuple[str, str], float]:
    """Return the learning rate of each method on each task with the smallest mean loss.

    Of several rates, which `grid` allows with validation examples only, it is the loss on those.
    While seeds are missing, it is that of the seeds that every rate has.
    """
    rates: dict[tuple[str, str], dict[float, dict[int, _FinishedRun]]] = {}
    for (task, method, rate), group in groups.items():
        rates.setdefault((task, method), {})[rate] = {run.seed: run for run in group}
    best: dict[tuple[str, str], float] = {}
    for place, by_rate in rates.items():
        shared = set.intersection(*map(set, by_rate.values()))
        losses = {
            rate: _comparable_loss([run for seed, run in runs.items() if seed in (shared or runs)])
            for rate, runs in by_rate.items()
        }
        best[place] = min(losses, key=losses.__getitem__)
    return best


def _comparable_loss(group: Sequence[_FinishedRun]) -> float:
    """Return the mean loss, or ∞ where a run diverged: it is the worst."""
    mean = _mean(run.loss for run in group)
    return math.inf if math.isnan(mean) else mean


def _summary(
    key: Key, group: Sequence[_FinishedRun], target_loss: float, best: bool
) -> MethodSummary:
    task, method, rate = key
    curves = [_curve(run) for run in group]
    steps = [_step_reaching(target_loss, curve) for curve in curves]
    gradients = [run.result["first_gradient_b"] for run in group]
    measured = {name: _mean_std(_measures(group, name)) for name in _MEASURED}
    return MethodSummary(
        task=task,
        method=method,
        learning_rate=rate,
        seeds=len(group),
        first_gradient_b=_mean_std_of_all(gradients),
        steps_to_target=_mean_std_of_all(steps),
        curve=mean_curve(curves),
        scores={run.seed: run.result["score"] for run in group},
        best=best,
        **measured,
    )


def _measures(group: Sequence[_FinishedRun], name: str) -> list[float]:
    """Return a measure of all runs; the seconds of those that were resumed are of a part alone."""
    whole = [run for run in group if not run.result["resumed"]]
    runs = whole if whole and name.endswith("_seconds") else group
    return [run.result[name] for run in runs]


def _step_reaching(target_loss: float, curve: Sequence[KnownPoint]) -> int | None:
    """Return the first step whose evaluation loss is at most the target."""
    for step, loss, _ in curve:
        if loss <= target_loss:
            return step
    return None


def _mean_std_of_all(values: Sequence[float | None]) -> MeanStd | None:
    """Return mean and deviation; None unless every seed has a value."""
    known = [value for value in values if value is not None]
    return _mean_std(known) if len(known) == len(values) else None


def _mean_std(values: Sequence[float]) -> MeanStd:
    """Return mean and deviation; where a run diverged, neither is a number."""
    mean = _mean(values)
    if len(values) == 1:
        return MeanStd(mean, None)
    finite = all(map(math.isfinite, values))
    return MeanStd(mean, statistics.stdev(values) if finite else math.nan)


def _curve(run: _FinishedRun) -> list[KnownPoint]:
    """Return the evaluations of a run.

    A score that no evaluation measures is known after the last one.
    """
    lines = [line for line in read_metrics(run.folder) if "eval_loss" in line]
    points: list[KnownPoint] = []
    for number, line in enumerate(lines, 1):
        final = run.result["validation"] or run.result
        final_score = final["score"] if number == len(lines) else None
        points.append((line["step"], line["eval_loss"], line.get("eval_score", final_score)))
    return points


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan
