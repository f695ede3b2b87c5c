"""What the probe of starts found, from the lines of its runs, as tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from probe_search import (
    SEEDS,
    best_position,
    chosen_position,
    final_loss,
    losses_of,
    position_of,
    read_lines,
    select,
)

_T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 %, by the number of seeds


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the mean of paired differences and the half width of its 95 % interval (Student)."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), _T_QUANTILES[len(differences)] * spread


def steps_until(curve: Sequence[Mapping[str, Any]], loss: float) -> float | None:
    """Return the step at which a curve first reaches a loss, between two points by a line."""
    for before, after in pairwise(curve):
        if before["loss"] is None or after["loss"] is None:
            return None
        if after["loss"] <= loss:
            drop = before["loss"] - after["loss"]
            share = (before["loss"] - loss) / drop if drop > 0 else 1.0
            return float(before["step"] + max(share, 0.0) * (after["step"] - before["step"]))
    return None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def rooms(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how much more full fine-tuning gains than LoRA on each task, most first.

    As a share of what LoRA gains: of losses on validation examples, each at its best rate.
    """
    shares = {}
    for task in dict.fromkeys(line["task"] for line in lines):
        runs = [select(lines, task=task, start=start) for start in ("lora", "full")]
        if all(runs):
            lora, full = (min(map(final_loss, known)) for known in runs)
            shares[task] = (lora - full) / (runs[0][0]["curve"][0]["loss"] - lora)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def choose_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return what LoRA and full fine-tuning reach on validation examples, most room first."""
    rows = []
    for task, room in rooms(lines).items():
        runs = [select(lines, task=task, start=start) for start in ("lora", "full")]
        lora, full = (min(known, key=final_loss) for known in runs)
        seconds = statistics.median(line["cpu_seconds"] for line in runs[0])
        figures = [f"{room:+.1%}", f"{lora['participation']:.1f}", f"{seconds:.0f}"]
        begin = f"{lora['curve'][0]['loss']:.3f}"
        rows.append([task, begin, _told_end(lora), _told_end(full), *figures])
    header = [
        "task", "loss at the start", "lora: loss, score (rate)", "full: loss, score (rate)", "room",
        "PR, median layer", "CPU seconds a run",
    ]  # fmt: skip
    return table(header, rows)


def _told_end(line: Mapping[str, Any]) -> str:
    last = line["curve"][-1]
    return f"{last['loss']:.3f}, {last['score']:.3f} ({line['rate']:.1e})"


Means = dict[tuple[str, float, float], float]  # (start, rate, α) → final loss, ∞ if diverged


def fixed_tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the final validation loss by scale, rate and α, per task, and over all of them.

    Means over seeds; a bold figure is the best of its column.
    """
    starts = list(dict.fromkeys(line["start"] for line in lines))
    texts = []
    to_lora: dict[str, list[float]] = defaultdict(list)
    for task in dict.fromkeys(line["task"] for line in lines):
        of_task = select(lines, task=task)
        columns = sorted({(line["alpha"], line["rate"]) for line in of_task})
        header = ["start", *(f"α {alpha:g}, {rate:g}" for alpha, rate in columns)]
        means = _means(of_task)
        rows = [[start, *(_cell(means, start, *column) for column in columns)] for start in starts]
        texts.append(f"### {task}\n\n{table(header, rows)}")
        for (start, rate, alpha), loss in means.items():
            reference = means.get(("lora", rate, alpha), math.inf)
            if math.isfinite(loss) and math.isfinite(reference):
                to_lora[start].append(loss - reference)
    summary = []
    for start in starts:
        lost = sum(line["diverged"] for line in select(lines, start=start))
        mean, worst = statistics.mean(to_lora[start]), max(to_lora[start])
        summary.append([start, f"{mean:+.3f}", f"{worst:+.3f}", str(lost)])
    header = ["start", "loss less lora's, mean", "worst cell", "runs that diverged"]
    return "\n".join([*texts, "### Over all tasks, rates and α\n", table(header, summary)])


def _means(lines: Iterable[Mapping[str, Any]]) -> Means:
    losses: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for line in lines:
        losses[line["start"], line["rate"], line["alpha"]].append(final_loss(line))
    return {key: statistics.mean(values) for key, values in losses.items()}


def _cell(means: Means, start: str, alpha: float, rate: float) -> str:
    loss = means.get((start, rate, alpha))
    if loss is None:
        return "–"
    text = "diverged" if math.isinf(loss) else f"{loss:.3f}"
    others = [other for key, other in means.items() if key[1:] == (rate, alpha)]
    return f"**{text}**" if loss == min(others) else text


@dataclass(frozen=True)
class Cell:
    """The runs of one start, task and rank at the chosen rate, by seed."""

    runs: list[Mapping[str, Any]]
    at_edge: bool

    def mean(self, value: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.mean(value(run) for run in self.runs)


def cell_of(lines: Sequence[Mapping[str, Any]], **which: Any) -> Cell | None:
    """Return the runs at the rate that validation chooses; None where the search is not done."""
    losses = losses_of(lines, **which)
    position = chosen_position(losses)
    if position is None:
        return None
    runs = select(lines, **which)
    at_rate = [line for line in runs if position_of(line["rate"]) == position]
    if any(line["diverged"] for line in at_rate):
        return None
    tried = [place for place, seed in losses if seed == SEEDS[0]]
    at_edge = best_position(losses, SEEDS[0]) in (min(tried), max(tried))
    return Cell(sorted(at_rate, key=lambda line: line["seed"]), at_edge)


def grid_table(lines: Sequence[Mapping[str, Any]], task: str, rank: int) -> str:
    """Return what each start reaches at its own best rate on a task at a rank."""
    lora = cell_of(lines, task=task, rank=rank, start="lora")
    if lora is None:
        return "LoRA's search is not done.\n"
    rows = []
    for start in dict.fromkeys(line["start"] for line in lines):
        cell = cell_of(lines, task=task, rank=rank, start=start)
        if cell is not None:
            rows.append([start, *_rates(cell, lora), *_validation(cell, lora), *_test(cell, lora)])
    header = [
        "start", "κ", "rate", "LoRA's rate over it", "validation loss at ¼, ½, end", "less lora's",
        "steps to lora's end", "test loss", "less lora's", "test score", "less lora's",
    ]  # fmt: skip
    return table(header, rows)


def _rates(cell: Cell, lora: Cell) -> list[str]:
    rate = cell.runs[0]["rate"]
    edge = " (edge)" if cell.at_edge else ""
    kappa = cell.mean(lambda run: run["kappa"])
    return [f"{kappa:.2f}", f"{rate:.1e}{edge}", f"{lora.runs[0]['rate'] / rate:.1f}"]


def _validation(cell: Cell, lora: Cell) -> list[str]:
    ends = [cell.mean(partial(_loss_at, share)) for share in (0.25, 0.5, 1)]
    reference = lora.mean(partial(_loss_at, 1))
    reached = [steps_until(run["curve"], reference) for run in cell.runs]
    steps = [step for step in reached if step is not None]
    told = f"{statistics.mean(steps):.0f}" if steps else "–"
    if 0 < len(steps) < len(reached):
        told += f" ({len(steps)} of {len(reached)})"
    return [
        ", ".join(f"{loss:.3f}" for loss in ends),
        _paired(cell, lora, partial(_loss_at, 1)),
        told,
    ]


def _test(cell: Cell, lora: Cell) -> list[str]:
    texts = []
    for measure in ("loss", "score"):
        value = partial(_test_value, measure)
        texts += [f"{cell.mean(value):.3f}", _paired(cell, lora, value)]
    return texts


def _loss_at(share: float, run: Mapping[str, Any]) -> float:
    """Return the validation loss after a share of the steps."""
    [loss] = [point["loss"] for point in run["curve"] if point["step"] == share * run["steps"]]
    return float(loss)


def _test_value(measure: str, run: Mapping[str, Any]) -> float:
    return float(run["test"][measure])


def _paired(cell: Cell, lora: Cell, value: Callable[[Mapping[str, Any]], float]) -> str:
    """Return the mean difference to LoRA with the same seeds, and its interval."""
    if cell is lora or cell.runs[0]["start"] == "lora":
        return "0"
    pairs = zip(cell.runs, lora.runs, strict=True)
    mean, half = interval([value(ours) - value(theirs) for ours, theirs in pairs])
    return f"{mean:+.3f} ± {half:.3f}"


def participation_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the participation ratio of the inputs beside what EVA gains, per task and rank."""
    rows = []
    for task, rank in dict.fromkeys((line["task"], line["rank"]) for line in lines):
        lora = cell_of(lines, task=task, rank=rank, start="lora")
        if lora is None:
            continue
        gains = []
        for start in dict.fromkeys(line["start"] for line in lines):
            cell = cell_of(lines, task=task, rank=rank, start=start)
            if start.startswith("eva") and cell is not None:
                gains.append(f"{start} {_paired(cell, lora, partial(_test_value, 'loss'))}")
        run = lora.runs[0]
        ratio, least, most = (run[f"participation{end}"] for end in ("", "_least", "_most"))
        told = f"{ratio:.1f} ({least:.1f} to {most:.1f})"
        rows.append([task, str(rank), told, f"{rank / ratio:.2f}", "; ".join(gains)])
    return table(["task", "r", "PR", "r / PR", "test loss less lora's"], rows)


def report(folder: Path) -> str:
    """Return all tables in Markdown."""
    lines = {part: read_lines(folder / f"{part}.jsonl") for part in ("choose", "fixed", "grid")}
    texts = ["# Starts at tuned rates"]
    if lines["choose"]:
        texts += ["## Room: full fine-tuning over LoRA", choose_table(lines["choose"])]
    if lines["fixed"]:
        texts += ["## Scales at the rates and α that users bring", fixed_tables(lines["fixed"])]
    for task, rank in dict.fromkeys((line["task"], line["rank"]) for line in lines["grid"]):
        texts += [f"## {task}, r {rank}", grid_table(lines["grid"], task, rank)]
    if lines["grid"]:
        texts += ["## Participation ratio and gain", participation_table(lines["grid"])]
    return "\n\n".join(texts)
