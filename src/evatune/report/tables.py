"""Tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from evatune.calibration.result import Calibration
from evatune.choices import SCALES
from evatune.ranks.allocation import RankPlan
from evatune.report.summary import LayerRow, layer_rows, plan_of, totals
from evatune.utils.extras import extras
from evatune.utils.markup import printable
from evatune.utils.text import shortened

with extras(__name__):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

_LONG = 80
_PIPED_WIDTH = 250
_NO_LIMIT = 10_000
_LORA_RATE = 2e-4  # that many users of LoRA bring


def console() -> Console:
    """Return a console for stdout, wide enough for layer names where there is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_PIPED_WIDTH)


def show_calibration(
    terminal: Console, calibration: Calibration, scales: Sequence[str] = SCALES
) -> None:
    """Print the table, and the lines below it, with the learning rates that belong to `scales`."""
    plan, problem = plan_of(calibration)
    terminal.print(calibration_table(terminal, calibration, plan))
    say(terminal, *summary_lines(calibration, plan, scales))
    if problem:
        say(terminal, f"No ranks: {problem}.")


def say(terminal: Console, *lines: str) -> None:
    """Print text as it is; folded at words on a terminal, left whole in a pipe."""
    for line in lines:
        terminal.print(plain(line), soft_wrap=not terminal.is_terminal)


def plain(text: str) -> Text:
    """Return a text that rich prints as it is.

    Brackets are no styles, colons no emoji, and nothing moves the cursor.
    """
    return Text(printable(text))


def calibration_table(terminal: Console, calibration: Calibration, plan: RankPlan) -> Table:
    """Return a table of layers, or of layer types where that would be more than a screen or two."""
    rows = layer_rows(calibration, plan)
    return _per_layer(terminal, rows) if len(rows) <= _LONG else _per_type(terminal, rows)


def _per_layer(terminal: Console, rows: list[LayerRow]) -> Table:
    headings = (
        *("layer", "in→out", "rank", "PR"),
        *("parameters", "rows", "explained", "captured", "missed", "status"),
    )
    lines = [
        (
            row.name,
            f"{row.spec.in_features}→{row.spec.out_features}",
            str(row.rank),
            effective(row.participation_ratio),
            f"{row.parameters:,}",
            f"{row.rows:,}",
            percent(row.explained),
            percent(row.captured),
            percent(row.estimated_missed),
            row.status,
        )
        for row in rows
    ]
    styles = ["yellow" if row.attention else "" for row in rows]
    return _fitted(
        terminal,
        "What each layer got",
        headings,
        lines,
        styles,
        spare=("in→out", "rows", "parameters", "explained", "PR", "missed"),
    )


def _per_type(terminal: Console, rows: list[LayerRow]) -> Table:
    headings = (
        "layer type",
        "layers",
        "rank min",
        "mean",
        "max",
        "PR median",
        "parameters",
        "captured mean",
        "worst",
        "missed worst",
        "statuses",
    )
    lines = []
    for layer_type in dict.fromkeys(row.type for row in rows):
        members = [row for row in rows if row.type == layer_type]
        ranks = [row.rank for row in members]
        captured = [row.captured for row in members if row.captured is not None]
        missed = [row.estimated_missed for row in members if row.estimated_missed is not None]
        participation = [row.participation_ratio for row in members if row.participation_ratio]
        counts = Counter(row.status for row in members)
        lines.append(
            (
                layer_type,
                str(len(members)),
                str(min(ranks)),
                f"{sum(ranks) / len(ranks):.1f}",
                str(max(ranks)),
                effective(median(participation) if participation else None),
                f"{sum(row.parameters for row in members):,}",
                percent(sum(captured) / len(captured) if captured else None),
                percent(min(captured, default=None)),
                percent(max(missed, default=None)),
                ", ".join(f"{n} {status}" for status, n in counts.items()),
            )
        )
    spare = ("parameters", "layers", "captured mean", "PR median", "missed worst")
    return _fitted(terminal, "What each layer type got", headings, lines, [""] * len(lines), spare)


def _fitted(
    terminal: Console,
    title: str,
    headings: Sequence[str],
    lines: Sequence[Sequence[str]],
    styles: Sequence[str],
    spare: Sequence[str],
) -> Table:
    """Return a table without as many of the `spare` columns as a narrow terminal asks for.

    A line below it names those.
    """
    for dropped in range(len(spare) + 1):
        gone = spare[:dropped]
        table = Table(
            title=title,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            caption_justify="left",
        )
        kept = [index for index, heading in enumerate(headings) if heading not in gone]
        for index in kept:
            # The first column holds names and the last statuses; what stands between are numbers.
            number = index > 0 and not headings[index].startswith("status")
            table.add_column(
                headings[index],
                justify="right" if number else "left",
                no_wrap=number,
                overflow="fold",
            )
        for line, style in zip(lines, styles, strict=True):
            table.add_row(*(plain(line[index]) for index in kept), style=style)
        if gone:
            table.caption = f"Left out for want of room: {', '.join(gone)}. --json has them."
        if (
            Measurement.get(terminal, terminal.options.update(max_width=_NO_LIMIT), table).maximum
            <= terminal.width
        ):
            break
    return table


def summary_lines(calibration: Calibration, plan: RankPlan, scales: Sequence[str]) -> list[str]:
    """Return the lines below the table; one has the learning rates that belong to `scales`."""
    t = totals(calibration, plan)
    change = t["parameters"] / t["uniform_parameters"] - 1 if t["uniform_parameters"] else 0.0
    lines = [
        (
            f"{t['layers']} layers with {t['distinct_inputs']} distinct inputs, {t['batches']}"
            f" batches; {t['ranks']} ranks, {t['parameters']:,} parameters ({change:+.1%} against"
            f" LoRA of rank {plan.rank} everywhere)"
        ),
    ]
    if t["captured_mean"] is not None:
        lines.append(
            f"Energy of unseen rows inside the chosen directions: {percent(t['captured_mean'])} on"
            f" average, {percent(t['captured_worst'])} in the worst layer;"
            f" {percent(t['of_achievable_mean'])} and {percent(t['of_achievable_worst'])} of what"
            " the same ranks explain of the rows that chose them"
        )
    if t["estimated_missed"] is not None:
        lines.append(
            f"Estimated miss: {percent(t['estimated_missed'])} of the energy that the best"
            " directions would capture of fresh data, as a mean over the ranks"
        )
    lines += _lines_of_steps(t, scales)
    for status in dict.fromkeys(calibration.status.values()):
        if status != "converged":
            names = [name for name, other in calibration.status.items() if other == status]
            advice = status.advice[0].upper() + status.advice[1:]
            lines.append(f"{status}: {shortened(names, 3)}. {advice}.")
    return lines


def _lines_of_steps(figures: Mapping[str, Any], scales: Sequence[str]) -> list[str]:
    """Return what the spectra say about the learning rate, and about what there is to gain."""
    steps = {scale: figures["step_ratio"][scale] for scale in scales}
    rates = [
        f"{rate_text(_LORA_RATE / spread['median'])} at scale={scale}, where κ is"
        f" {_in_words(spread)}"
        for scale, spread in steps.items()
        if spread is not None
    ]
    lines = []
    if rates:
        lines.append(
            f"A LoRA rate of {rate_text(_LORA_RATE)} corresponds to {'; '.join(rates)}. B's first"
            " steps change the outputs κ times as much as LoRA's"
        )
    participation = figures["participation_ratio"]
    if participation is not None:
        lines.append(
            "Participation ratio PR, the effective number of directions that an input has:"
            f" {_in_words(participation)}; the rank is above it in {figures['layers_above_pr']} of"
            f" {figures['layers_with_rank']} layers"
        )
    return lines


def _in_words(spread: Mapping[str, float]) -> str:
    return "{median:.3g} (median; {least:.3g} to {largest:.3g})".format(**spread)


def adapter_table(terminal: Console, rows: Iterable[dict[str, Any]]) -> Table:
    """Return a table with a line per layer of a saved adapter."""
    headings = ("layer", "rank", "alpha", "scale", "parameters", "mean row norm of A", "norm of B")
    lines = [
        (
            row["layer"],
            str(row["rank"]),
            f"{row['alpha']:g}",
            f"{row['scale']:g}",
            f"{row['parameters']:,}",
            f"{row['a_row_norm']:.4g}",
            f"{row['b_norm']:.4g}",
        )
        for row in rows
    ]
    spare = ("parameters", "mean row norm of A", "alpha")
    return _fitted(terminal, "Adapter", headings, lines, [""] * len(lines), spare)


def rate_text(rate: float) -> str:
    """Return a learning rate for people: "2e-4", "8.1e-6"."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def effective(number: float | None) -> str:
    """Return an effective number of directions for people; a dash where there is none."""
    return "–" if number is None else f"{number:.1f}"


def percent(share: float | None) -> str:
    """Return a share in [0, 1] for people; a dash where there is none."""
    return "–" if share is None else f"{share:.1%}"
