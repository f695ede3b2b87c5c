"""The page of a comparison: who is ahead, how sure that is, and the curves of all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evatune.finetune.comparison.statistics import DomainComparison, PairedDifference
from evatune.finetune.comparison.summary import Comparison, MeanStd, MethodSummary
from evatune.finetune.recipe import REFERENCE, Recipe
from evatune.finetune.recipe_tree import all_settings, as_tree
from evatune.report.charts import Curve, Score, curves, scores
from evatune.report.evidence import compared, interval_text, signed
from evatune.report.pages.base import (
    Cell,
    Chart,
    Page,
    Table,
    Tile,
    document,
    number_cell,
    text_cell,
)
from evatune.report.pages.calibration import adapter_facts
from evatune.report.pages.run import model_name
from evatune.report.text import NONE
from evatune.report.verdicts import SUBJECT

_HEADINGS = ["task", "method", "learning rate", "seeds", "score", "±", "loss", "steps to target"]
_HEADINGS += ["parameters", "gradient of B", "seconds to initialize", "to train"]
_MEANING = (
    "±: standard deviation over seeds. Differences are paired by seed, with 95 % intervals of t"
    " over seeds. A win is an interval above 0, a loss one below, a tie one that holds 0.",
    "Only the seed varies: start, order of the data, dropout. Other examples would scatter more.",
)


def render(
    comparison: Comparison,
    recipes: Sequence[Recipe],
    made_by: str,
    next_command: str,
    failed: int = 0,
) -> str:
    """Return the page of a comparison as one HTML document.

    Args:
        recipes: that were run. made_by: the command. next_command: shown to be copied.
        failed: runs that gave no result.
    """
    best = [line for line in comparison.lines if line.best]
    methods = list(dict.fromkeys(line.method for line in comparison.lines))
    differences = _differences(best, methods)
    page = Page(
        title=_title(methods, list(comparison.targets)),
        facts=_facts(comparison, recipes, methods),
        verdict=verdict(differences, best, failed),
        command=next_command,
        tiles=_tiles(comparison, differences),
        charts=_charts(best, methods, _loss_title(recipes)),
        tables=_tables(comparison, best, differences),
        notes=[f"Made by: {made_by}", *_targets(comparison), *_MEANING],
        settings=_settings(recipes),
    )
    return document(page)


def _title(methods: Sequence[str], tasks: Sequence[str]) -> str:
    names = methods if len(methods) <= 4 else [*methods[:3], f"{len(methods) - 3} more"]
    where = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    return f"{', '.join(names)} on {where}"


def _facts(
    comparison: Comparison, recipes: Sequence[Recipe], methods: Sequence[str]
) -> dict[str, str]:
    adapters = {
        adapter_facts(recipe.adapter.rank, recipe.adapter.rho, recipe.adapter.alpha)
        for recipe in recipes
    }
    models = {model_name(recipe) for recipe in recipes}
    rates = sorted({line.learning_rate for line in comparison.lines})
    seeds = sorted({seed for line in comparison.lines for seed in line.scores})
    return {
        "model": ", ".join(sorted(models)),
        "data": ", ".join(f"{recipe.domain} / {recipe.task}" for recipe in recipes[:4])
        + (" …" if len(recipes) > 4 else ""),
        "methods": ", ".join(methods),
        "r / ρ / α": ", ".join(sorted(adapters)),
        "learning rates": ", ".join(f"{rate:g}" for rate in rates),
        "seeds": ", ".join(map(str, seeds)),
    }


def _differences(best: Sequence[MethodSummary], methods: Sequence[str]) -> DomainComparison | None:
    """Return the differences to LoRA, or to the first method where LoRA is not among them."""
    values: dict[str, dict[str, dict[int, float | None]]] = {}
    for line in best:
        values.setdefault(line.task, {})[line.method] = dict(line.scores)
    reference = REFERENCE if REFERENCE in methods else next(iter(methods), REFERENCE)
    return compared(values, reference)


def verdict(
    differences: DomainComparison | None, best: Sequence[MethodSummary], failed: int
) -> str:
    """Return who is ahead and whether that is more than scatter, in one sentence."""
    missing = f"; {failed} runs failed" if failed else ""
    if not best:
        return f"No run has ended{missing}."
    if differences is None or not differences.methods:
        return f"There is nothing to compare: no two methods share a seed on every task{missing}."
    named = [line for line in differences.methods if line.method == SUBJECT]
    line = named[0] if named else max(differences.methods, key=lambda line: line.mean)
    side = "above" if line.mean >= 0 else "below"
    apart = f"{100 * abs(line.mean):.1f} points {side} {differences.reference}"
    text = f"{line.method} is {apart} in score"
    if len(differences.tasks) > 1:
        text += f", mean over {len(differences.tasks)} tasks"
    test = line.fixed_tasks
    if test is None:
        return f"{text}, with one seed: no evidence of a difference{missing}."
    meanings = {
        "tie": "the interval holds 0, so this is a tie",
        "win": "more than the seeds scatter",
        "loss": "more than the seeds scatter",
    }
    meaning = meanings[test.interval.outcome]
    if not named and len(differences.methods) > 1:  # the interval does not know that it was chosen
        meaning += (
            f"; as the best of {len(differences.methods)}, p = {line.fixed_tasks_holm:.2g} by Holm"
        )
    return f"{text}, 95 % interval {interval_text(test).strip()}: {meaning}{missing}."


def _tiles(comparison: Comparison, differences: DomainComparison | None) -> list[Tile]:
    averages = comparison.averages()
    order = sorted(averages, key=lambda name: -averages[name])
    tiles = [Tile(f"{averages[name]:.3f}", f"score of {name}, mean") for name in order[:6]]
    if differences is not None:
        line = next((line for line in differences.methods if line.method == SUBJECT), None)
        if line is not None and line.wins + line.ties + line.losses:  # none of a single seed
            counts = f"{line.wins} / {line.ties} / {line.losses}"
            tiles.append(
                Tile(counts, f"tasks {SUBJECT} won / tied / lost against {differences.reference}")
            )
    return tiles


def _loss_title(recipes: Sequence[Recipe]) -> str:
    """Return the title of the losses while training, by the examples that they are of."""
    validated = {recipe.data.has_validation for recipe in recipes}
    if validated == {True}:
        return "Validation loss"
    return "Test loss" if validated == {False} else "Evaluation loss"


def _charts(best: Sequence[MethodSummary], methods: Sequence[str], loss_title: str) -> list[Chart]:
    if not best:
        return []
    points = [Score(line.task, line.method, line.score.mean, line.score.deviation) for line in best]
    losses = [
        Curve(line.method, [(step, loss) for step, loss, _ in line.curve], line.task)
        for line in best
    ]
    of_score = [
        Curve(line.method, known, line.task)
        for line in best
        if (known := [(step, score) for step, _, score in line.curve if score is not None])
    ]
    shown = [
        Chart(
            "scores",
            "Test score after training",
            scores(points, methods),
            "Each method at its best rate; the line is a standard deviation over seeds each way.",
        ),
        Chart("loss", loss_title, curves(losses, methods), "Mean over seeds."),
    ]
    if any(len(curve.points) > 1 for curve in of_score):
        note = "Mean over seeds."
        shown.append(
            Chart("score", "Score on validation examples", curves(of_score, methods), note)
        )
    return shown


def _tables(
    comparison: Comparison, best: Sequence[MethodSummary], differences: DomainComparison | None
) -> list[Table]:
    tables = [Table("methods", "Methods", _HEADINGS, list(map(_row, best)), folded=False)]
    if differences is not None:
        headings = (
            "task",
            "method",
            f"less {differences.reference}",
            "95 % interval",
            "seeds",
            "outcome",
        )
        rows = list(map(_difference_row, differences.paired))
        tables.append(Table("differences", "Differences, paired by seed", headings, rows))
    if len(comparison.lines) > len(best):
        note = "The best rate of a method is that of the smallest mean loss on validation examples."
        rows = list(map(_row, comparison.lines))
        tables.append(Table("rates", "All learning rates", _HEADINGS, rows, note))
    return tables


def _row(line: MethodSummary) -> list[Cell]:
    return [
        text_cell(line.task),
        text_cell(line.method),
        number_cell(line.learning_rate, "g"),
        number_cell(line.seeds, "d"),
        number_cell(line.score.mean, ".3f"),
        number_cell(line.score.deviation, ".3f"),
        number_cell(line.eval_loss.mean, ".3f"),
        _mean_cell(line.steps_to_target, ".0f"),
        number_cell(line.trainable_parameters.mean, ",.0f"),
        _mean_cell(line.first_gradient_b, ".3g"),
        number_cell(line.init_seconds.mean, ".1f"),
        number_cell(line.train_seconds.mean, ".1f"),
    ]


def _mean_cell(value: MeanStd | None, form: str) -> Cell:
    return number_cell(None if value is None else value.mean, form)


def _difference_row(line: PairedDifference) -> list[Cell]:
    return [
        text_cell(line.task),
        text_cell(line.method),
        Cell(line.mean, f"{signed(line.mean)} points"),
        text_cell(interval_text(line.test).strip() or NONE),
        number_cell(len(line.seeds), "d"),
        text_cell(line.outcome or "unknown (one seed)"),
    ]


def _targets(comparison: Comparison) -> list[str]:
    goals = ", ".join(f"{task} {loss:.3f}" for task, loss in comparison.targets.items())
    return [f"Target, an evaluation loss: {goals}."] if goals else []


def _settings(recipes: Sequence[Recipe]) -> Mapping[str, Any]:
    """Return the settings of the recipes: those that differ with the values of each."""
    trees = [all_settings(as_tree(recipe)) for recipe in recipes]
    varied = ("method", "seed")
    settings = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = list(dict.fromkeys(str(tree[key]) for tree in trees))
        if key not in varied:
            settings[key] = ", ".join(values)
    return settings
