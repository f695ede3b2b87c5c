"""Cells and sentences of plain text about a calibration; needs no other library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evatune.calibration.result import Calibration
from evatune.report.summary import Figures, LayerRow, Spread, Totals, type_rows
from evatune.utils.text import shortened

NONE = "–"  # in place of a figure that is not known
LORA_RATE = 2e-4  # that many users of LoRA bring
_LITTLE = 2.0  # times a random A, below which there is little that data could say
_FEW = 100  # examples, below which chance alone moves a score by ten points
_SETTLED = 0.01  # estimated miss at which the default rule stops

LAYER_HEADINGS = (
    *("layer", "in→out", "rank", "PR"),
    *("parameters", "rows", "explained", "captured", "missed", "status"),
)
TYPE_HEADINGS = (
    *("layer type", "layers", "rank min", "mean", "max", "PR median"),
    *("parameters", "captured mean", "worst", "missed worst", "statuses"),
)

_WORDS = {
    *("layer", "layer type", "task", "metric", "method", "what", "what it does", "source"),
    *("status", "statuses"),
}


def is_number(heading: str) -> bool:
    """Return whether a column of this heading holds numbers, which stand to the right."""
    return heading not in _WORDS


def layer_cells(rows: Sequence[LayerRow]) -> list[tuple[str, ...]]:
    """Return a line of cells per layer, in the order of `LAYER_HEADINGS`."""
    return [
        (
            row.name,
            f"{row.spec.in_features}→{row.spec.out_features}",
            str(row.rank),
            or_dash(row.participation_ratio, ".1f"),
            f"{row.parameters:,}",
            f"{row.rows:,}",
            percent(row.explained),
            percent(row.captured),
            percent(row.estimated_missed),
            row.status,
        )
        for row in rows
    ]


def type_cells(rows: Sequence[LayerRow]) -> list[tuple[str, ...]]:
    """Return a line of cells per layer type, in the order of `TYPE_HEADINGS`."""
    return [
        (
            row.type,
            str(row.layers),
            str(row.rank_min),
            f"{row.rank_mean:.1f}",
            str(row.rank_max),
            or_dash(row.participation_ratio, ".1f"),
            f"{row.parameters:,}",
            percent(row.captured_mean),
            percent(row.captured_worst),
            percent(row.missed_worst),
            row.statuses,
        )
        for row in type_rows(rows)
    ]


def verdict(figures: Figures) -> str:
    """Return the result in one sentence."""
    if figures.problem:
        return f"No ranks can be given: {figures.problem}."
    share, of_random = figures.known_mean, figures.totals.random_mean
    if share is None or not of_random:
        return "Nothing is known of what the directions hold: no row was seen."
    ratio = share / of_random
    held = (
        f"The chosen directions hold {percent(share)} of the energy, {times(ratio)} what a random"
        f" A of the same ranks would ({percent(of_random)})"
    )
    if ratio < _LITTLE:
        return f"{held}: there is little to gain over LoRA's own start here."
    if not is_settled(figures.calibration):
        missed = percent(figures.totals.estimated_missed)
        return f"{held}; they may miss {missed} of what the best ones hold: read more batches."
    return f"{held}: ready to train."


def is_settled(calibration: Calibration) -> bool:
    """Return whether more batches are expected to change little."""
    missed = calibration.estimated_missed
    return missed is None or missed <= max(_SETTLED, calibration.config.tolerance)


def summary_lines(figures: Figures, scales: Sequence[str]) -> list[str]:
    """Return the lines below the table; one has the learning rates that belong to `scales`."""
    totals, statuses = figures.totals, figures.calibration.status
    lines = [
        (
            f"{totals.layers} layers with {totals.distinct_inputs} distinct inputs,"
            f" {totals.batches} batches; {totals.ranks} ranks, {totals.parameters:,} parameters"
            f" ({signed_percent(totals.parameter_change)} against LoRA of rank"
            f" {figures.plan.rank} everywhere)"
        ),
    ]
    if totals.captured_mean is not None:
        lines.append(
            "Energy of unseen rows inside the chosen directions:"
            f" {percent(totals.captured_mean)} on average,"
            f" {percent(totals.captured_worst)} in the worst layer;"
            f" {percent(totals.of_achievable_mean)} and {percent(totals.of_achievable_worst)} of"
            " what the same ranks explain of the rows that chose them"
        )
    if totals.estimated_missed is not None:
        lines.append(
            f"Estimated miss: {percent(totals.estimated_missed)} of the energy that the best"
            " directions would capture of fresh data, as a mean over the ranks"
        )
    lines += _lines_of_steps(totals, scales)
    for status in dict.fromkeys(statuses.values()):
        if status != "converged":
            names = [name for name, other in statuses.items() if other == status]
            advice = status.advice[0].upper() + status.advice[1:]
            lines.append(f"{status}: {shortened(names, 3)}. {advice}.")
    return lines


def _lines_of_steps(totals: Totals, scales: Sequence[str]) -> list[str]:
    """Return what the spectra say about the learning rate, and about what there is to gain."""
    steps = {scale: totals.step_ratio[scale] for scale in scales}
    rates = [
        f"{rate_text(LORA_RATE / spread.median)} at scale={scale}, where κ is {in_words(spread)}"
        for scale, spread in steps.items()
        if spread is not None
    ]
    lines = []
    if rates:
        lines.append(
            f"A LoRA rate of {rate_text(LORA_RATE)} corresponds to {'; '.join(rates)}. B's first"
            " steps change the outputs κ times as much as LoRA's"
        )
    participation = totals.participation_ratio
    if participation is not None:
        lines.append(
            "Participation ratio PR, the effective number of directions that an input has:"
            f" {in_words(participation)}; the rank is above it in {totals.layers_above_pr} of"
            f" {totals.layers_with_rank} layers"
        )
    return lines


def in_words(spread: Spread) -> str:
    """Return a median with the ends of its figures; alone where they look the same."""
    middle, least, largest = (
        f"{value:.3g}" for value in (spread.median, spread.least, spread.largest)
    )
    return middle if least == largest else f"{middle} (median; {least} to {largest})"


def score_text(result: Mapping[str, Any]) -> str:
    """Return a run's score for people: "score 0.833 (accuracy, n = 6)"."""
    number = f"score {result['score']:.3f}"
    if result["scored"] is None:  # a run of an older version
        return number
    return f"{number} ({result['score_name']}, n = {result['scored']:,})"


def caution(result: Mapping[str, Any]) -> str:
    """Return that a score was measured on too few examples; nothing where they are enough."""
    count = result["scored"]
    if not count or count >= _FEW:
        return ""
    advice = "test on hundreds to compare runs"
    if result["score_name"] != "accuracy":
        return f"n = {count} says little: {advice}"
    points = 100 / math.sqrt(count)  # two standard errors of a share near a half
    chance = f"by chance alone accuracy moves by ±{points:.0f} points"
    return f"n = {count} says little: {chance}; {advice}"


def rate_text(rate: float) -> str:
    """Return a learning rate for people: "2e-4", "8.1e-6"."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def or_dash(value: float | None, form: str) -> str:
    """Return a figure for people; a dash where there is none."""
    return NONE if value is None else f"{value:{form}}"


def percent(share: float | None) -> str:
    """Return a share in [0, 1] for people; a dash where there is none."""
    return or_dash(share, ".1%")


def signed_percent(share: float) -> str:
    """Return a difference of shares for people: "+4.4%", "−4.4%"."""
    return with_minus(f"{share:+.1%}")


def with_minus(number: str) -> str:
    """Return a number with a minus sign, as charts have it, in place of a hyphen before it."""
    return number.replace("-", "−", 1) if number.startswith("-") else number


def times(ratio: float) -> str:
    """Return a ratio for people: "2.5 times", "13 times"."""
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"
