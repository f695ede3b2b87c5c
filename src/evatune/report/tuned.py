"""Pages and tables of a tuned comparison: Markdown with pictures, and rich for the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, stdev
from typing import Any

from evatune.errors import ConfigError
from evatune.finetune.comparison.statistics import DomainDifference, PairedDifference, TTest
from evatune.finetune.comparison.tuned_cells import Cell, Group, TunedSummary
from evatune.report.advice import advice, repeat_command
from evatune.report.evidence import Verdict, compared, interval_text, score_differences, signed
from evatune.report.plots import save_figure
from evatune.report.tables import fitted_table
from evatune.report.tuned_plots import curves_plot, forest_plot, ranks_plot, rates_plot
from evatune.report.verdicts import SUBJECT, verdicts
from evatune.utils.atomic import write_text
from evatune.utils.extras import extras
from evatune.utils.markup import markdown_code, markdown_text, printable

with extras(__name__):
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

_NONE = "–"
METHOD_HEADINGS = (
    "method", "score", "less LoRA's: these tasks", "tasks like these", "bootstrap", "p (Holm)",
    "won, tied, lost", "mean rank", "steps to LoRA's loss", "steps to 90 % of full", "area saved",
    "parameters", "init s", "train s", "memory MB",
)  # fmt: skip
CELL_HEADINGS = (
    "task", "method", "rate", "score", "less LoRA's", "loss", "steps to LoRA's loss",
    "steps to 90 % of full", "parameters", "train s", "κ", "PR",
)  # fmt: skip
_SPARE = (  # of a narrow terminal, the most dispensable first
    "PR", "κ", "train s", "parameters", "steps to 90 % of full", "loss", "steps to LoRA's loss",
)  # fmt: skip
LEGEND = (
    "Scores in points (hundredths), ± the standard deviation over seeds. Differences to LoRA are"
    " paired by seed, with 95 % intervals: on these tasks (t over seeds), on tasks like these (t"
    " over tasks), and by a hierarchical bootstrap over tasks and seeds, which is too narrow with"
    " few tasks. p is that of these tasks. Mean rank: 1 is the best. Steps: median over seeds, of a"
    " run; – where more than half never get there. To LoRA's loss, of methods that are alike, half"
    " of the runs get before their end and half never: the verdict takes a loss that both reach."
    " Area saved: how much more of LoRA's improvement"
    " is there, mean over the steps. Seconds and memory are medians, and of a machine that did"
    " other work beside."
)


def write_pages(summary: TunedSummary, folder: Path, command: str) -> list[Path]:
    """Write `README.md`, a page per domain, and their pictures as SVG and PNG.

    Args:
        command: that makes them again.

    Raises ConfigError where there is nothing to show.
    """
    if not summary.groups:
        raise ConfigError("there are no finished runs to make pages of; run the comparison first")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _figures(summary):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out, once for both files
        for kind in ("svg", "png"):
            save_figure(figure, folder / f"{name}.{kind}")
            written.append(folder / f"{name}.{kind}")
    pages = {"README": overview_page(summary, command)}
    pages |= {domain: domain_page(summary, domain, command) for domain in summary.domains}
    for name, text in pages.items():
        write_text(folder / f"{name}.md", text)
        written.append(folder / f"{name}.md")
    return written


def _slug(group: Group) -> str:
    return re.sub(r"[^\w.]+", "-", f"{group.domain}-{group.condition}").strip("-")


def _figures(summary: TunedSummary) -> Iterable[tuple[str, Figure]]:
    for group in summary.groups:
        comparison = score_differences([group])
        if comparison is not None:
            yield f"{_slug(group)}-forest", forest_plot(comparison, group.domain)
        yield f"{_slug(group)}-curves", curves_plot(group, summary.methods)
        yield f"{_slug(group)}-loss-by-rate", rates_plot(group, summary.methods, "loss")
        yield f"{_slug(group)}-score-by-rate", rates_plot(group, summary.methods, "score")
        ranks = ranks_plot(group, SUBJECT)
        if ranks is not None:
            yield f"{_slug(group)}-ranks", ranks


def overview_page(summary: TunedSummary, command: str) -> str:
    """Return the summary: the verdicts, by domain and over all, and a table per condition."""
    lines = ["# Methods at tuned learning rates", "", _made_by(command), "", *protocol(summary)]
    for condition in dict.fromkeys(group.condition for group in summary.groups):
        groups = [group for group in summary.groups if group.condition == condition]
        lines += ["", f"## {_title(condition)}", "", *_verdict_lines(verdicts(groups))]
        lines += ["", *_domains_table(groups), ""]
        for group in groups:
            lines += [
                f"### [{group.domain}]({group.domain}.md)",
                "",
                *_picture(group, "forest"),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def overview_lines(summary: TunedSummary) -> list[str]:
    """Return the verdicts as lines for the terminal."""
    return [
        f"{' '.join(filter(None, (group.domain, group.condition)))}: {verdict.claim}"
        f" {verdict.outcome.capitalize()}. {verdict.text}"
        for group in summary.groups
        for verdict in verdicts([group])
    ]


def _title(condition: str) -> str:
    return markdown_text(condition) if condition else "At the recipes' settings"


def _made_by(command: str) -> str:
    return f"Made by {markdown_code(command)} from the lines of finished runs."


def protocol(summary: TunedSummary) -> list[str]:
    """Return how rates were chosen and tested, and where not all is there; lines of Markdown."""
    tuning = sorted({seed for group in summary.groups for seed in group.tuning_seeds})
    tests = sorted({seed for group in summary.groups for seed in group.test_seeds})
    cells = [cell for group in summary.groups for cell in group.cells]
    chosen = [cell for cell in cells if cell.rate is not None]
    at_edge = [cell for cell in chosen if cell.at_edge]
    unsettled = [cell for cell in chosen if not cell.settled]
    untested = [cell for cell in chosen if not cell.scores]
    lost = [cell for cell in cells if cell.rate is None]
    tested_before = [cell for cell in cells if cell.tested_at_other_rates]
    texts = [
        f"{summary.runs} runs. Rates were chosen by the final validation loss of the seeds"
        f" {_seeds(tuning)}; test examples were measured with the seeds {_seeds(tests)}, by runs"
        " that chose nothing. A verdict answers one question and is not corrected for the number"
        " of questions; the p of the tables are, by Holm, over the methods of a domain."
    ]
    for members, words in (
        (at_edge, "have their best rate at the edge of the grid"),
        (unsettled, "have fewer than three tuning seeds at the chosen rate"),
        (untested, "have no test yet at the chosen rate"),
        (lost, "diverged at every rate, or have no run that chooses one"),
        (tested_before, "have earlier tests, at a rate that more runs showed not to be the best"),
    ):
        if members:
            names = ", ".join(f"{cell.method} on {cell.task}" for cell in members[:8])
            more = ", …" if len(members) > 8 else ""
            texts.append(
                f"**{len(members)} of {len(cells)} cells {words}**: {markdown_text(names)}{more}."
            )
    return "\n\n".join(texts).split("\n")


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "(none yet)"


def _verdict_lines(answers: Iterable[Verdict]) -> list[str]:
    return [
        f"- **{verdict.claim} {verdict.outcome.capitalize()}.** {verdict.text}"
        for verdict in answers
    ]


def _domains_table(groups: Sequence[Group]) -> list[str]:
    """Return mean differences to LoRA, a row per method and a column per domain."""
    columns = {group.domain: score_differences([group]) for group in groups}
    if len(groups) > 1:
        columns["all"] = score_differences(groups)
    by_column = {
        name: {line.method: line for line in comparison.methods} if comparison else {}
        for name, comparison in columns.items()
    }
    methods = list(dict.fromkeys(name for group in groups for name in group.methods))
    rows = []
    for method in methods:
        lines = [by_method.get(method) for by_method in by_column.values()]
        if any(lines):
            rows.append([method, *map(_mean_difference, lines)])
    if not rows:
        return ["Nothing can be held against LoRA yet."]
    return ["Test score less LoRA's, points:", "", *_table(["method", *columns], rows)]


def domain_page(summary: TunedSummary, domain: str, command: str) -> str:
    """Return the page of a domain."""
    groups = [group for group in summary.groups if group.domain == domain]
    lines = [f"# {domain}", "", _made_by(command), "[Summary](README.md)."]
    lines += ["", *protocol(TunedSummary(tuple(groups), _runs(groups)))]
    for group in groups:
        lines += ["", f"## {_title(group.condition)}", "", *_verdict_lines(verdicts([group]))]
        lines += ["", *_table(METHOD_HEADINGS, method_rows(group)), "", *_rank_lines(group)]
        lines += [LEGEND, ""]
        for kind, words in _PICTURES.items():
            lines += [f"### {words}", "", *_picture(group, kind), ""]
        lines += ["### By task", "", *_table(CELL_HEADINGS, cell_rows(group)), ""]
        lines += [r"\* at the edge of the grid of rates.", "", *_advice_lines(group)]
        lines += _commands(group)
    return "\n".join(lines).rstrip() + "\n"


_PICTURES = {
    "forest": "Differences to LoRA: thick on these tasks, thin on tasks like these, small by task",
    "curves": "Validation loss over steps, at tuned rates",
    "loss-by-rate": "Validation loss against the learning rate; what is far worse lies outside",
    "score-by-rate": "Validation score against the learning rate",
    "ranks": "Ranks of EVA",
}


def _runs(groups: Iterable[Group]) -> int:
    return sum(
        len(cell.scores)
        + cell.tested_at_other_rates
        + sum(len(point.losses) for point in cell.rates)
        for group in groups
        for cell in group.cells
    )


def _picture(group: Group, kind: str) -> list[str]:
    known = {
        "forest": score_differences([group]) is not None,
        "ranks": any(cell.ranks for cell in group.of(SUBJECT)),
    }
    if not known.get(kind, True):
        return ["Nothing to draw yet."]
    name = f"{_slug(group)}-{kind}"
    return [f"[![{kind}]({name}.svg)]({name}.png)"]


def _rank_lines(group: Group) -> list[str]:
    comparison = score_differences([group])
    if comparison is None or comparison.ranks.critical_difference is None:
        return []
    text = (
        f"Mean ranks further apart than {comparison.ranks.critical_difference:.2f} differ at 5 %"
        f" (Nemenyi)."
    )
    if comparison.incomplete_methods:
        names = ", ".join(
            f"{method} (without {', '.join(tasks)})"
            for method, tasks in comparison.incomplete_methods.items()
        )
        text += f" Left out of means and ranks, as tasks are missing: {markdown_text(names)}."
    return [text, ""]


def method_rows(group: Group) -> list[list[str]]:
    """Return a row per method over the tasks of a domain, the best score first."""
    scores = score_differences([group])
    areas = compared(group.area_saved())
    differences = {line.method: line for line in (scores.methods if scores else ())}
    areas_by_method = {line.method: line.mean for line in (areas.methods if areas else ())}
    rows = []
    for method in sorted(group.methods, key=lambda name: -_mean_score(group, name)):
        cells = group.of(method)
        score = _mean_score(group, method)
        row = [method, _NONE if math.isinf(score) else f"{100 * score:.1f}"]
        row += _difference_cells(differences.get(method))
        rank = scores.ranks.ranks.get(method) if scores else None
        area = areas_by_method.get(method)
        row += [
            _NONE if rank is None else f"{rank:.1f}",
            _share(cells, lambda cell: cell.convergence.to_reference),
            _share(cells, lambda cell: cell.convergence.to_full),
            _NONE if area is None else signed(area),
            _median(cells, _count, ",.0f"),
            _median(cells, lambda cell: cell.init_seconds, ".1f"),
            _median(cells, lambda cell: cell.train_seconds, ".1f"),
            _median(cells, _megabytes, ".0f"),
        ]
        rows.append(row)
    return rows


def _difference_cells(line: DomainDifference | None) -> list[str]:
    if line is None:
        return [_NONE] * 5
    bootstrap = line.bootstrap
    return [
        _difference(line.mean, line.fixed_tasks),
        interval_text(line.random_tasks).strip() or _NONE,
        f"[{signed(bootstrap.low)}, {signed(bootstrap.high)}]" if bootstrap else _NONE,
        _NONE if line.fixed_tasks_holm is None else f"{line.fixed_tasks_holm:.2g}",
        f"{line.wins}, {line.ties}, {line.losses}",
    ]


def _mean_score(group: Group, method: str) -> float:
    """Return the mean test score over the tasks; −∞ where one lacks."""
    scores = [cell.score for cell in group.of(method)]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(group.tasks) else -math.inf


def cell_rows(group: Group) -> list[list[str]]:
    """Return a row per task and method, the best score of a task first."""
    comparison = score_differences([group])
    lines = comparison.paired if comparison else ()
    paired = {(line.task, line.method): line for line in lines}
    cells = sorted(
        group.cells, key=lambda cell: (group.tasks.index(cell.task), -_or(cell.score, -1.0))
    )
    return [_cell_row(cell, paired.get((cell.task, cell.method))) for cell in cells]


def _cell_row(cell: Cell, paired: PairedDifference | None) -> list[str]:
    mark = " *" if cell.at_edge else ""
    diverged = sum(score is None for score in cell.scores.values())
    return [
        cell.task,
        cell.method,
        "diverged" if cell.rate is None else f"{cell.rate:.3g}{mark}",
        _spread([100 * (score or 0.0) for score in cell.scores.values()], ".1f")
        + (f" ({diverged} diverged)" if diverged else ""),
        _difference(paired.mean, paired.test) if paired else _NONE,
        _spread([loss for loss in cell.losses.values() if loss is not None], ".3f"),
        _steps(cell.convergence.to_reference),
        _steps(cell.convergence.to_full),
        _median([cell], _count, ",.0f"),
        _median([cell], lambda cell: cell.train_seconds, ".1f"),
        _median([cell], lambda cell: cell.kappa, ".2f"),
        _median([cell], lambda cell: cell.participation, ".1f"),
    ]


def _count(cell: Cell) -> float | None:
    return median(cell.parameters.values()) if cell.parameters else None


def _megabytes(cell: Cell) -> float | None:
    return cell.peak_memory_bytes / 2**20 if cell.peak_memory_bytes else None


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _mean_difference(line: DomainDifference | None) -> str:
    return _NONE if line is None else _difference(line.mean, line.fixed_tasks)


def _difference(mean: float, test: TTest | None) -> str:
    return signed(mean) + interval_text(test)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return _NONE
    mean = sum(values) / len(values)
    return f"{mean:{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def _steps(steps: Mapping[int, float]) -> str:
    middle = median(steps.values()) if steps else math.inf
    if not steps or math.isinf(middle):
        return _NONE
    reached = sum(map(math.isfinite, steps.values()))
    return f"{middle:.0f}" + ("" if reached == len(steps) else f" ({reached} of {len(steps)})")


def _share(cells: Sequence[Cell], steps: Callable[[Cell], Mapping[int, float]]) -> str:
    """Return the steps as a share of a run, in the median over tasks."""
    shares = [median(steps(cell).values()) / cell.steps for cell in cells if steps(cell)]
    middle = median(shares) if shares else math.inf
    return _NONE if math.isinf(middle) else f"{100 * middle:.0f} %"


def _median(cells: Sequence[Cell], of: Callable[[Cell], float | None], form: str) -> str:
    values = [value for value in map(of, cells) if value is not None]
    return f"{median(values):{form}}" if values else _NONE


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
        *("| " + " | ".join(map(markdown_text, row)) + " |" for row in rows),
    ]


def _advice_lines(group: Group) -> list[str]:
    lines = [f"- {markdown_text(f'{each.task}: {each.text}.')}" for each in advice(group)]
    return ["By validation alone:", "", *lines, ""] if lines else []


def _commands(group: Group) -> list[str]:
    """Return the command of each row, folded, with the scores of its seeds."""
    texts = []
    for cell in group.cells:
        command = repeat_command(cell)
        if command is not None:
            scores = ", ".join(
                f"{seed}: {'diverged' if score is None else format(score, '.4f')}"
                for seed, score in cell.scores.items()
            )
            texts += [f"# score by seed: {scores}", printable(command)]
    if not texts:
        return ["No row has a known recipe and a test, so no command repeats one."]
    return [
        "<details><summary>Commands that repeat the rows</summary>", "", "```", *texts, "```", "",
        "</details>",
    ]  # fmt: skip


def tuned_tables(summary: TunedSummary, terminal: Console) -> list[Table]:
    """Return a table per domain and condition, as wide as the terminal allows."""
    return [
        fitted_table(
            terminal,
            f"{group.domain} {group.condition}".strip(),
            CELL_HEADINGS,
            cell_rows(group),
            spare=_SPARE,
        )
        for group in summary.groups
    ]


def tuned_facts(summary: TunedSummary) -> dict[str, Any]:
    """Return verdicts and cells for `--json`; what is not finite is None."""
    return {
        "verdicts": [
            {"domain": group.domain, "condition": group.condition} | asdict(verdict)
            for group in summary.groups
            for verdict in verdicts([group])
        ],
        "advice": [
            {"domain": group.domain, "condition": group.condition} | asdict(each)
            for group in summary.groups
            for each in advice(group)
        ],
        "cells": [
            {
                "domain": group.domain,
                "condition": group.condition,
                "task": cell.task,
                "method": cell.method,
                "learning_rate": cell.rate,
                "inside": cell.inside,
                "score": cell.score,
                "scores": dict(cell.scores),
                "command": repeat_command(cell),
            }
            for group in summary.groups
            for cell in group.cells
        ],
    }
