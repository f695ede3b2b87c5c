"""Pages of a tuned comparison as Markdown, with pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from evatune.errors import ConfigError
from evatune.finetune.comparison.statistics import DomainDifference
from evatune.finetune.comparison.tuned_cells import Group, TunedSummary
from evatune.report.advice import advice, repeat_command
from evatune.report.evidence import Verdict, difference_text, score_differences
from evatune.report.markdown import markdown_table
from evatune.report.plots import save_figure
from evatune.report.text import NONE
from evatune.report.tuned import (
    CELL_HEADINGS,
    LEGEND,
    METHOD_HEADINGS,
    cell_rows,
    method_rows,
)
from evatune.report.tuned_plots import curves_plot, forest_plot, ranks_plot, rates_plot
from evatune.report.verdicts import SUBJECT, verdicts
from evatune.utils.atomic import write_text
from evatune.utils.extras import extras
from evatune.utils.markup import markdown_code, markdown_text, printable

with extras(__name__):
    from matplotlib.figure import Figure

_PICTURES = {
    "forest": "Differences to LoRA: thick on these tasks, thin on tasks like these, small by task",
    "curves": "Validation loss over steps, at tuned rates",
    "loss-by-rate": "Validation loss against the learning rate; what is far worse lies outside",
    "score-by-rate": "Validation score against the learning rate",
    "ranks": "Ranks of EVA",
}


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
    """Return the summary: per condition a table of the domains, their pictures, and verdicts."""
    lines = ["# Methods at tuned learning rates", "", _made_by(command), "", *protocol(summary)]
    lines += ["", f"What each method is: {markdown_code('evatune methods')}."]
    for condition in dict.fromkeys(group.condition for group in summary.groups):
        groups = [group for group in summary.groups if group.condition == condition]
        lines += ["", f"## {_title(condition)}", "", *_domains_table(groups), ""]
        for group in groups:
            lines += [
                f"### [{group.domain}]({group.domain}.md)",
                "",
                *_picture(group, "forest"),
                "",
            ]
        lines += ["### Verdicts", "", *_verdict_lines(verdicts(groups))]
    return "\n".join(lines).rstrip() + "\n"


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
        (tested_before, "were tested before, at a rate that later runs showed not to be the best"),
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
    return ["Test score less LoRA's, points:", "", *markdown_table(["method", *columns], rows)]


def domain_page(summary: TunedSummary, domain: str, command: str) -> str:
    """Return the page of a domain."""
    groups = [group for group in summary.groups if group.domain == domain]
    lines = [f"# {domain}", "", _made_by(command), "[Summary](README.md)."]
    lines += ["", *protocol(TunedSummary(tuple(groups), _runs(groups)))]
    for group in groups:
        lines += ["", f"## {_title(group.condition)}", "", *_verdict_lines(verdicts([group]))]
        lines += ["", *markdown_table(METHOD_HEADINGS, method_rows(group)), "", *_rank_lines(group)]
        lines += [LEGEND, ""]
        for kind, words in _PICTURES.items():
            lines += [f"### {words}", "", *_picture(group, kind), ""]
        lines += ["### By task", "", *markdown_table(CELL_HEADINGS, cell_rows(group)), ""]
        lines += [r"\* at the edge of the grid of rates.", "", *_advice_lines(group)]
        lines += _commands(group)
    return "\n".join(lines).rstrip() + "\n"


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


def _mean_difference(line: DomainDifference | None) -> str:
    return NONE if line is None else difference_text(line.mean, line.fixed_tasks)


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
