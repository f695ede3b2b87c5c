"""Figures read off the curves of runs: how soon one is where another ends, areas, means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from evatune.schemas.tuned import RunLine

_SHARE_OF_FULL = 0.9  # of full fine-tuning's improvement

Point = tuple[int, float | None, float | None]  # step, validation loss, score
KnownPoint = tuple[int, float, float | None]  # one whose loss is known


@dataclass(frozen=True)
class Convergence:
    """The speed of a method's runs beside LoRA's and full fine-tuning's, by seed."""

    to_reference: Mapping[int, float]  # steps to LoRA's final validation loss; infinite: never
    to_full: Mapping[int, float]  # steps to 90 % of full fine-tuning's improvement
    sooner: Mapping[int, float]  # share of a run by which it is before LoRA; see `sooner_by`
    area: Mapping[int, float]  # share of LoRA's improvement that lacks, mean over the steps


def convergence(
    runs: Mapping[int, RunLine], references: Mapping[int, RunLine], full: Mapping[int, RunLine]
) -> Convergence:
    """Return how soon the runs of a method are where others end.

    Args:
        runs: of a method, by seed; each is held against the same seed of the others.
        references: LoRA's. full: full fine-tuning's.
    """
    to_reference: dict[int, float] = {}
    to_full: dict[int, float] = {}
    sooner: dict[int, float] = {}
    area: dict[int, float] = {}
    for seed, line in runs.items():
        reference = references.get(seed)
        if reference is not None:
            sooner[seed] = sooner_by(line, reference)
        goal = _ends(reference)
        if goal is not None:
            start, end = goal
            to_reference[seed] = steps_until(line.curve, end)
            mean = start if line.diverged else _mean_loss(line.curve)  # then nothing is gained
            if mean is not None and start > end:
                area[seed] = (mean - end) / (start - end)
        goal = _ends(full.get(seed))
        if goal is not None:
            start, end = goal
            to_full[seed] = steps_until(line.curve, start - _SHARE_OF_FULL * (start - end))
    return Convergence(to_reference, to_full, sooner, area)


def sooner_by(line: RunLine, reference: RunLine) -> float:
    """Return by which share of a run one reaches what both reach: the larger of the final losses.

    It is negative where the reference is sooner, -1 where the run diverged, and 1 where the
    reference did. Exchanged, two runs have the opposite figure, so that runs which differ by chance
    alone have 0 in the mean. Steps to the reference's own final loss would favor the run: it is
    before the end there, or never.
    """
    if line.diverged or reference.diverged:
        return float(reference.diverged) - float(line.diverged)
    goal = max(line.final_loss, reference.final_loss)
    steps = line.settings.training.steps
    # At the end at the latest, also where an evaluation on the way has no loss.
    at, reference_at = (min(steps_until(run.curve, goal), steps) for run in (line, reference))
    return (reference_at - at) / steps


def _ends(line: RunLine | None) -> tuple[float, float] | None:
    """Return the first and the last validation loss of a run; None where it diverged."""
    if line is None or line.diverged or not line.curve:
        return None
    start, end = line.curve[0][1], line.final_loss
    return None if start is None or math.isinf(end) else (start, end)


def steps_until(curve: Sequence[Point], loss: float) -> float:
    """Return the step at which a curve first reaches a loss, between two points by a line.

    Infinite for a curve that never does, or breaks off before.
    """
    if curve and curve[0][1] is not None and curve[0][1] <= loss:
        return float(curve[0][0])
    for (step, before, _), (next_step, after, _) in pairwise(curve):
        if before is None or after is None:
            break
        if after <= loss:
            return step + (before - loss) / (before - after) * (next_step - step)
    return math.inf


def _mean_loss(curve: Sequence[Point]) -> float | None:
    """Return the area under a curve over its length; None where a loss is missing."""
    steps = [step for step, _, _ in curve]
    losses = [loss for _, loss, _ in curve if loss is not None]
    if len(losses) < max(2, len(curve)):
        return None
    return float(np.trapezoid(losses, steps)) / (steps[-1] - steps[0])


def mean_curve(
    curves: Sequence[Sequence[Point]],
) -> list[KnownPoint]:
    """Return mean validation losses and scores at the steps at which all curves have a loss."""
    by_step = [{step: (loss, score) for step, loss, score in curve} for curve in curves]
    common = sorted(set.intersection(*map(set, by_step))) if by_step else []
    points: list[KnownPoint] = []
    for step in common:
        losses = [points_of[step][0] for points_of in by_step]
        scores = [points_of[step][1] for points_of in by_step]
        loss = _mean(losses)
        if loss is not None:
            points.append((step, loss, _mean(scores)))
    return points


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
