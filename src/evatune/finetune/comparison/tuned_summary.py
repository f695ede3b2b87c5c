"""A tuned comparison in figures: from the lines of its runs to one summary.

Rates are chosen by validation losses of tuning seeds. Test scores, and everything that is said of
convergence and cost, come from the runs of other seeds at the chosen rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from evatune.errors import ConfigError
from evatune.finetune.comparison.curves import (
    Convergence,
    KnownPoint,
    Point,
    convergence,
    mean_curve,
)
from evatune.finetune.comparison.rate_rule import best_position, finalists
from evatune.finetune.recipe import REFERENCE
from evatune.finetune.recipe_files import load, ours
from evatune.finetune.recipe_tree import all_settings, as_tree
from evatune.schemas.tuned import RunLine

FULL = "full"
_TUNING_SEEDS = 3  # of a rate that can be chosen
_LORA_PLUS = "loraplus"
LOWER_RATES = 2  # of the grid, next below LoRA's best
_ALPHA = "adapter.alpha"
_OF_THE_RUN = ("method", "seed", "training.learning_rate")
# Settings of which each value is a method of its own, and how methods that heed them are called.
_EVAS = ("eva", "lora-redist")
_RATIO_OF_B = "training.lora_plus_ratio"
_OF_METHODS = {
    "adapter.rho": _EVAS,
    "adapter.scale": _EVAS,
    "adapter.budget": _EVAS,
    _RATIO_OF_B: (_LORA_PLUS,),
}

Values = dict[str, dict[str, dict[int, float | None]]]  # task → method → seed → value


@dataclass(frozen=True)
class Source:
    """The name of a recipe, as `evatune train` takes it, and its settings."""

    name: str
    settings: Mapping[str, Any]  # flat: {"training.steps": 60, …}


@dataclass(frozen=True)
class RatePoint:
    """A learning rate of the search: what each tuning seed reached on validation examples."""

    rate: float
    losses: Mapping[int, float]  # by seed; infinite where the run diverged
    scores: Mapping[int, float]  # by seed; 0 where the run diverged

    @property
    def loss(self) -> float:
        return fmean(self.losses.values())

    @property
    def score(self) -> float:
        return fmean(self.scores.values())


@dataclass(frozen=True)
class Cell:
    """A method on a task, at the rate that validation chose.

    Values by seed are those of test seeds, at this rate; empty while there are none.

    Attributes:
        kappa: the factor by which the first step is larger than LoRA's at the same rate, the
            median over all runs. LoRA+'s larger rate of B is in it.
        tested_at_other_rates: runs that were tested at a rate which later ones showed not to be
            the best; nothing is made of them.
    """

    task: str
    method: str  # with settings that make it a method of its own: "eva (rho 1)"
    overrides: Mapping[str, Any] | None  # of the recipe; None where the recipe is not known
    recipe: str
    rates: tuple[RatePoint, ...]  # rising
    rate: float | None  # None where every rate diverged
    settled: bool  # whether three tuning seeds chose it
    scores: Mapping[int, float | None]  # on test examples; None where the run diverged
    losses: Mapping[int, float | None]  # on test examples
    curves: Mapping[int, tuple[Point, ...]]  # on validation examples
    steps: int  # of a run
    convergence: Convergence
    parameters: Mapping[int, int]
    init_seconds: float | None  # medians over the runs at this rate
    train_seconds: float | None
    peak_memory_bytes: float | None
    kappa: float | None
    participation: float | None
    ranks: Mapping[str, int] | None  # of the first test seed
    tested_at_other_rates: int = 0

    @property
    def inside(self) -> bool:
        """True if the chosen rate has worse rates on both sides."""
        return self.rate is not None and self.rates[0].rate < self.rate < self.rates[-1].rate

    @property
    def at_edge(self) -> bool:
        """True if the chosen rate is the smallest or the largest of several."""
        return self.rate is not None and len(self.rates) > 1 and not self.inside

    @property
    def validation_loss(self) -> float:
        """Mean final loss of the tuning seeds at the chosen rate; infinite where all diverged."""
        losses = self.tuning_losses.values()
        return fmean(losses) if losses else math.inf

    @property
    def tuning_losses(self) -> Mapping[int, float]:
        """Final validation losses at the chosen rate, by tuning seed; empty if all diverged."""
        return next((point.losses for point in self.rates if point.rate == self.rate), {})

    @property
    def score(self) -> float | None:
        """Mean test score; a run that diverged counts as 0."""
        return fmean(value or 0.0 for value in self.scores.values()) if self.scores else None

    @property
    def curve(self) -> list[KnownPoint]:
        """Mean validation loss and score over the seeds, at the steps that all of them have."""
        return mean_curve(list(self.curves.values()))


@dataclass(frozen=True)
class Group:
    """The cells of a domain under the same conditions: those of the recipes, or another rank."""

    domain: str
    condition: str  # "" for the settings of the recipes
    cells: tuple[Cell, ...]
    tuning_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @cached_property
    def methods(self) -> list[str]:
        return sorted({cell.method for cell in self.cells}, key=method_order)

    def cell(self, task: str, method: str) -> Cell | None:
        return self._by_place.get((task, method))

    def of(self, method: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.method == method]

    def cells_on(self, task: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.task == task]

    def test_scores(self) -> Values:
        """Return test scores; None where the run diverged."""
        return self._values(lambda cell: dict(cell.scores))

    def steps_saved(self) -> Values:
        """Return by which share of a run methods are before LoRA; see `sooner_by`."""
        return self._values(lambda cell: dict(cell.convergence.sooner))

    def area_saved(self) -> Values:
        """Return each run's mean progress toward LoRA's final validation loss.

        It is a share of LoRA's improvement, and the mean is over the steps.
        """

        def saved(cell: Cell) -> dict[int, float | None]:
            return {seed: 1 - area for seed, area in cell.convergence.area.items()}

        return self._values(saved)

    def gained_at_lower_rates(self) -> Values:
        """Return what methods gain at rates below LoRA's best, over what LoRA gains at its best.

        A gain is the fall of the validation loss in training, 0 where the run diverged; the mean
        over `LOWER_RATES` rates, by tuning seed. Methods that lack one of the rates are left out.
        """
        return self._values(lambda cell: _gains_below(cell, self.cell(cell.task, REFERENCE)))

    def parameters_saved(self) -> Values:
        """Return by which share of LoRA's trainable parameters a method has fewer."""

        def saved(cell: Cell) -> dict[int, float | None]:
            reference = self.cell(cell.task, REFERENCE)
            of_reference = reference.parameters if reference else {}
            return {
                seed: 1 - count / of_reference[seed]
                for seed, count in cell.parameters.items()
                if of_reference.get(seed)
            }

        return self._values(saved)

    @cached_property
    def _by_place(self) -> dict[tuple[str, str], Cell]:
        return {(cell.task, cell.method): cell for cell in self.cells}

    def _values(self, of: Callable[[Cell], dict[int, float | None]]) -> Values:
        values: Values = {task: {} for task in self.tasks}
        for cell in self.cells:
            by_seed = of(cell)
            if by_seed:
                values[cell.task][cell.method] = by_seed
        return values


@dataclass(frozen=True)
class TunedSummary:
    """A tuned comparison, domain by domain."""

    groups: tuple[Group, ...]
    runs: int

    @property
    def methods(self) -> list[str]:
        return sorted({name for group in self.groups for name in group.methods}, key=method_order)

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(group.domain for group in self.groups))


def own_recipes(lines: Iterable[RunLine]) -> dict[tuple[str, str], Source]:
    """Return the recipes that come with evatune for the tasks of the lines."""
    keys = {line.key for line in lines}
    return {
        (domain, task): Source(name, all_settings(as_tree(load(name))))
        for domain, task in keys
        if (name := f"{domain}-{task}") in ours()
    }


def summarize(
    lines: Sequence[RunLine], recipes: Mapping[tuple[str, str], Source] | None = None
) -> TunedSummary:
    """Return the summary of the runs.

    Args:
        recipes: by domain and task, for commands that repeat a row. Default: those that come with
            evatune.

    Raises ConfigError for lines of one task that were made from different data or code, and for a
    seed that both chose a rate and tested it.
    """
    known = own_recipes(lines) if recipes is None else recipes
    placed: dict[tuple[str, str], dict[tuple[str, str], list[_Placed]]] = {}
    for key in sorted({line.key for line in lines}):
        domain, task = key
        of_task = [line for line in lines if line.key == key]
        for placed_line in _placed(of_task, known.get(key)):
            group = placed.setdefault((domain, placed_line.condition), {})
            group.setdefault((task, placed_line.method), []).append(placed_line)
    groups = [
        _group(domain, condition, cells, known)
        for (domain, condition), cells in sorted(placed.items())
    ]
    return TunedSummary(tuple(groups), len(lines))


def base_name(method: str) -> str:
    """Return a method's name in recipes: that of "eva (rho 1)" is "eva"."""
    return method.split(" ")[0]


def method_order(name: str) -> tuple[int, str]:
    """Return where a method stands among others: references, EVA, competitors, controls."""
    base = base_name(name)
    return (_ORDER.index(base) if base in _ORDER else len(_ORDER), name)


_ORDER = (
    "untouched", "head", "full", "lora", "eva", "eva-rho1", "eva-paper", "eva-paper-rho1",
    "eva-centered", "eva-paper-centered", "eva-dora", "eva-gradients", "eva-regression",
    "lora-orthogonal", "lora-ga", "gradient-a", "pissa", "dora", "loraplus", "rslora", "adalora",
    "milora", "olora", "corda", "lora-one", "mica", "lora-redist", "eva-paper-random", "eva-minor",
    "eva-shuffled", "lora-fa", "eva-fa",
)  # fmt: skip


@dataclass(frozen=True)
class _Placed:
    line: RunLine
    method: str
    condition: str
    overrides: Mapping[str, Any]


def _placed(lines: Sequence[RunLine], source: Source | None) -> list[_Placed]:
    """Return the lines of a task, each with its method and its conditions."""
    trees = [all_settings(line.tree()) for line in lines]
    base = trees[0] if source is None else source.settings
    differing = [_differing(tree, base) for tree in trees]
    shared = _shared(differing)
    placed = []
    for line, tree, overrides in zip(lines, trees, differing, strict=True):
        of_method = {
            key: overrides[key] for key in _settings_of_method(line.method) if key in overrides
        }
        no_condition = {*_OF_THE_RUN, *_OF_METHODS, *shared, _ALPHA}
        condition = {key: value for key, value in overrides.items() if key not in no_condition}
        if _alpha_over_rank(tree) != _alpha_over_rank({**tree, **base}):
            condition[_ALPHA] = _alpha(tree)
        method = f"{line.method} ({_words(of_method)})" if of_method else line.method
        placed.append(_Placed(line, method, _words(condition), overrides))
    return placed


def _alpha_over_rank(tree: Mapping[str, Any]) -> float:
    """Return α/r, of which another value is another condition."""
    scale: float = _alpha(tree) / tree["adapter.rank"]
    return scale


def _alpha(tree: Mapping[str, Any]) -> float:
    alpha: float = tree.get(_ALPHA, tree["adapter.rank"])
    return alpha


def _differing(tree: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `base` has too, with another value."""
    return {key: value for key, value in tree.items() if base.get(key, value) != value}


def _shared(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that all have with the same value."""
    common = set.intersection(*map(set, settings))
    first = settings[0]
    return [key for key in common if all(other[key] == first[key] for other in settings)]


def _settings_of_method(method: str) -> list[str]:
    """Return the settings of which each value makes a method of its own of this one."""
    return [key for key, names in _OF_METHODS.items() if method.startswith(names)]


def _words(settings: Mapping[str, Any]) -> str:
    """Return settings in words: "rank 16, budget parameters"."""
    return ", ".join(f"{_word(key)} {_figure(value)}" for key, value in settings.items())


def _word(key: str) -> str:
    name = key.rsplit(".", 1)[-1].removeprefix("lora_plus_")  # beside the method's own name
    return name.replace("_", " ")


def _figure(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def _group(
    domain: str,
    condition: str,
    placed: Mapping[tuple[str, str], Sequence[_Placed]],
    recipes: Mapping[tuple[str, str], Source],
) -> Group:
    lines = [placed_line.line for runs in placed.values() for placed_line in runs]
    for task in {task for task, _ in placed}:
        _require_one_origin([line for line in lines if line.settings.task == task])
    cells = []
    for (task, method), runs in placed.items():
        goals = {}
        for name in (REFERENCE, FULL):
            to_reach = [placed_line.line for placed_line in placed.get((task, name), [])]
            _, _, goals[name] = _final_runs(to_reach)
        source = recipes.get((domain, task))
        cells.append(_cell(task, method, runs, goals, source))
    order = list(dict.fromkeys(task for task, _ in placed))
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
    placed: Sequence[_Placed],
    goals: Mapping[str, Mapping[int, RunLine]],
    source: Source | None,
) -> Cell:
    lines = [placed_line.line for placed_line in placed]
    rates, rate, final = _final_runs(lines)
    overlap = {line.seed for line in lines if not line.tested} & set(final)
    if overlap:
        raise ConfigError(
            f"seed {min(overlap)} of {method!r} on {task!r} both chose the rate and tested it; test"
            " with other seeds"
        )
    at_rate = list(final.values()) or [line for line in lines if line.rate == rate]
    first = min(final.values(), key=lambda line: line.seed, default=lines[0])
    overrides = next(other.overrides for other in placed if other.line is first)
    steps = first.settings.training.steps
    return Cell(
        task=task,
        method=method,
        overrides=None if source is None else overrides,
        recipe="" if source is None else source.name,
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
    if line.kappa is None or line.method != _LORA_PLUS:
        return line.kappa
    ratio: float | None = all_settings(line.tree()).get(_RATIO_OF_B)
    return None if ratio is None else line.kappa * ratio


def _gains_below(cell: Cell, reference: Cell | None) -> dict[int, float | None]:
    if reference is None or not reference.curve:
        return {}
    start, end = reference.curve[0][1], reference.curve[-1][1]
    best = reference.rate or 0.0
    lower = [point.rate for point in reference.rates if point.rate < best][-LOWER_RATES:]
    losses = [point.losses for point in cell.rates if point.rate in lower]
    if len(losses) < LOWER_RATES or start <= end:
        return {}
    seeds = sorted(set.intersection(*map(set, losses)))
    gains: dict[int, float | None] = {}
    for seed in seeds:
        gained = fmean(max(0.0, start - by_seed[seed]) for by_seed in losses)
        gains[seed] = gained / (start - end)
    return gains


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
