"""A tuned comparison in figures: from the lines of its runs to one summary.

Rates are chosen by validation losses of tuning seeds. Test scores, and everything that is said of
convergence and cost, come from the runs of other seeds at the chosen rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from evatune.errors import ConfigError
from evatune.finetune.comparison.curves import convergence
from evatune.finetune.comparison.rate_rule import best_position, finalists
from evatune.finetune.comparison.tuned_cells import (
    FULL,
    Cell,
    Group,
    RatePoint,
    TunedSummary,
    method_order,
)
from evatune.finetune.comparison.tuned_conditions import KnownRecipe, LabeledRun, label_runs
from evatune.finetune.methods import METHODS
from evatune.finetune.methods.loraplus import RATIO_OF_B
from evatune.finetune.recipe import REFERENCE
from evatune.finetune.recipe_files import bundled_recipes, load
from evatune.finetune.recipe_tree import all_settings, as_tree
from evatune.schemas.tuned import RunLine

_TUNING_SEEDS = 3  # of a rate that can be chosen


def bundled_sources(lines: Iterable[RunLine]) -> dict[tuple[str, str], KnownRecipe]:
    """Return the recipes that come with evatune for the tasks of the lines."""
    keys = {line.key for line in lines}
    return {
        (domain, task): KnownRecipe(name, all_settings(as_tree(load(name))))
        for domain, task in keys
        if (name := f"{domain}-{task}") in bundled_recipes()
    }


def summarize(
    lines: Sequence[RunLine], recipes: Mapping[tuple[str, str], KnownRecipe] | None = None
) -> TunedSummary:
    """Return the summary of the runs.

    Args:
        recipes: by domain and task, for commands that repeat a row. Default: those that come with
            evatune.

    Raises ConfigError for lines of one task that were made from different data or code, and for a
    seed that both chose a rate and tested it.
    """
    known = bundled_sources(lines) if recipes is None else recipes
    labeled: dict[tuple[str, str], dict[tuple[str, str], list[LabeledRun]]] = {}
    for key in sorted({line.key for line in lines}):
        domain, task = key
        of_task = [line for line in lines if line.key == key]
        for run in label_runs(of_task, known.get(key)):
            group = labeled.setdefault((domain, run.condition), {})
            group.setdefault((task, run.method), []).append(run)
    groups = [
        _group(domain, condition, cells, known)
        for (domain, condition), cells in sorted(labeled.items())
    ]
    return TunedSummary(tuple(groups), len(lines))


def _group(
    domain: str,
    condition: str,
    labeled: Mapping[tuple[str, str], Sequence[LabeledRun]],
    recipes: Mapping[tuple[str, str], KnownRecipe],
) -> Group:
    lines = [run.line for runs in labeled.values() for run in runs]
    for task in {task for task, _ in labeled}:
        _require_one_origin([line for line in lines if line.settings.task == task])
    cells = []
    for (task, method), runs in labeled.items():
        goals = {}
        for name in (REFERENCE, FULL):
            to_reach = [run.line for run in labeled.get((task, name), [])]
            _, _, goals[name] = _final_runs(to_reach)
        recipe = recipes.get((domain, task))
        cells.append(_cell(task, method, runs, goals, recipe))
    order = list(dict.fromkeys(task for task, _ in labeled))
    cells.sort(key=lambda cell: (order.index(cell.task), method_order(cell.method)))
    tuning_seeds = sorted({line.seed for line in lines if not line.tested})
    test_seeds = sorted({line.seed for line in lines if line.tested})
    return Group(domain, condition, tuple(cells), tuple(tuning_seeds), tuple(test_seeds))


def _require_one_origin(lines: Sequence[RunLine]) -> None:
    origins = {(line.data, line.code) for line in lines}
    if len(origins) > 1:
        raise ConfigError(
            f"runs of the task {lines[0].settings.task!r} were made from {len(origins)} versions of"
            " its data or code, which cannot be compared; keep the lines of one of them"
        )


def _cell(
    task: str,
    method: str,
    labeled: Sequence[LabeledRun],
    goals: Mapping[str, Mapping[int, RunLine]],
    recipe: KnownRecipe | None,
) -> Cell:
    lines = [run.line for run in labeled]
    rates, rate, final = _final_runs(lines)
    overlap = {line.seed for line in lines if not line.tested} & set(final)
    if overlap:
        raise ConfigError(
            f"seed {min(overlap)} of {method!r} on {task!r} both chose the rate and tested it; test"
            " with other seeds"
        )
    at_rate = list(final.values()) or [line for line in lines if line.rate == rate]
    first = min(final.values(), key=lambda line: line.seed, default=lines[0])
    overrides = next(other.overrides for other in labeled if other.line is first)
    steps = first.settings.training.steps
    return Cell(
        task=task,
        method=method,
        overrides=None if recipe is None else overrides,
        recipe="" if recipe is None else recipe.name,
        rates=rates,
        rate=rate,
        settled=any(point.rate == rate and len(point.losses) >= _TUNING_SEEDS for point in rates),
        scores={seed: _test(line, "score") for seed, line in final.items()},
        losses={seed: _test(line, "loss") for seed, line in final.items()},
        curves={seed: line.curve for seed, line in final.items()},
        steps=steps,
        convergence=convergence(final, goals[REFERENCE], goals[FULL]),
        parameters={seed: line.parameters for seed, line in final.items()},
        init_seconds=_median(line.init_seconds for line in at_rate),
        train_seconds=_median(line.train_seconds for line in at_rate),
        peak_memory_bytes=_median(line.peak_memory_bytes for line in at_rate),
        kappa=_median(_first_step(line) for line in lines),
        participation=_median(line.participation for line in lines),
        ranks=first.ranks,
        tested_at_other_rates=sum(line.tested and line.rate != rate for line in lines),
    )


def _first_step(line: RunLine) -> float | None:
    """Return κ, of which a line has the part of A's rows and the adapter's scale."""
    method = METHODS.get(line.method)
    if line.kappa is None or method is None or RATIO_OF_B not in method.own_settings:
        return line.kappa
    ratio: float | None = all_settings(line.tree()).get(RATIO_OF_B)
    return None if ratio is None else line.kappa * ratio


def _final_runs(
    lines: Sequence[RunLine],
) -> tuple[tuple[RatePoint, ...], float | None, dict[int, RunLine]]:
    """Return the rates of the search, the chosen one, and its tested runs by seed."""
    points: dict[float, list[RunLine]] = {}
    for line in lines:
        if not line.tested:
            points.setdefault(line.rate, []).append(line)
    rates = tuple(
        RatePoint(
            rate,
            {line.seed: line.final_loss for line in runs},
            {line.seed: 0.0 if line.diverged else line.validation.score or 0.0 for line in runs},
        )
        for rate, runs in sorted(points.items())
    )
    rate = _chosen(rates)
    at_rate = [line for line in lines if line.rate == rate]
    tested = sorted((line for line in at_rate if line.tested), key=lambda line: line.seed)
    return rates, rate, {line.seed: line for line in tested}


def _chosen(rates: Sequence[RatePoint]) -> float | None:
    """Return the rate that the search chose.

    While it is not done, that of the seeds that have more than the first one's say so far.
    """
    losses = {
        (position, seed): loss
        for position, point in enumerate(rates)
        for seed, loss in point.losses.items()
    }
    counts = Counter(seed for _, seed in losses)
    if not counts:
        return None
    first = min(counts, key=lambda seed: (-counts[seed], seed))
    tried = [set(rates[position].losses) for position in finalists(losses, first)]
    shared = [seeds for seeds in tried if len(seeds) > 1]
    others = set.intersection(*shared) - {first} if shared else set()
    position = best_position(losses, [first, *sorted(others)])
    return None if position is None else rates[position].rate


def _test(line: RunLine, name: str) -> float | None:
    return None if line.diverged or line.test is None else getattr(line.test, name)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
