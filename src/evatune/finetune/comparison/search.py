"""A tuned comparison: every method's learning rate is searched on every task, then tested.

The search is `rate_rule`; here its trials become runs on many processes, and finished runs become
lines of a file, from which the same command goes on.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evatune.errors import ConfigError
from evatune.finetune.comparison.grid import (
    DIED,
    EXECUTORS,
    quiet_worker,
    require_comparable,
    require_executor,
    variant,
)
from evatune.finetune.comparison.rate_rule import Seeds, Trial, next_trials, positions, rate_at
from evatune.finetune.comparison.run_lines import append_line, read_lines, settings_digest
from evatune.finetune.comparison.workers import problem_of
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_tree import as_tree, parse
from evatune.schemas.tuned import RunLine

_Job = Literal["fingerprint", "tune", "test"]


@dataclass
class Search:
    """The search of one method's learning rate on one task.

    Attributes:
        recipe: of the task, whose learning rate is the middle of the grid.
        losses: of the trials that have ended: (position, seed) → validation loss, inf if diverged.
        running: trials that have not.
        problem: why it cannot go on.
    """

    recipe: Recipe
    method: str
    seeds: Seeds
    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    running: set[Trial] = field(default_factory=set)
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.recipe.task}, {self.method}"

    @property
    def diverged(self) -> bool:
        """True if the search is over and every trial has diverged."""
        over = not next_trials(self.losses, self.seeds)
        return over and all(math.isinf(loss) for loss in self.losses.values())

    def next_trial(self) -> Trial | None:
        """Return a trial that can begin now; None where there is none before another ends."""
        if self.problem is not None:
            return None
        waiting = (t for t in next_trials(self.losses, self.seeds) if t not in self.running)
        return next(waiting, None)

    def recipe_of(self, trial: Trial) -> Recipe:
        rate = rate_at(trial.position, self.recipe.training.learning_rate)
        return variant(self.recipe, self.method, trial.seed, rate)

    def take(self, line: RunLine) -> None:
        """Record a run that has ended, if it is one of this search.

        Raises ConfigError for a seed that is to choose the rate and was tested, or the other way.
        """
        position = positions(self.recipe.training.learning_rate).get(line.rate)
        if position is None:
            return
        trial = Trial(position, line.seed, tested=line.seed in self.seeds.test)
        if settings_digest(self.recipe_of(trial)) != line.id:
            return
        known = line.seed in (*self.seeds.tuning, *self.seeds.test)
        if known and line.tested != trial.tested:
            was, is_to = ("tested", "choose") if line.tested else ("chosen by", "be tested")
            raise ConfigError(
                f"{self.name}: seed {line.seed} was {was} before, in the same file, and is to"
                f" {is_to} now, so that what is tested would have been chosen by; give other seeds"
                " to --seeds and --test-seeds, or name another --out"
            )
        self.losses[position, line.seed] = line.final_loss
        self.running.discard(trial)


# Name of a search, what its run was, and what went wrong or None.
Progress = Callable[[str, Trial, str | None], None]


def tune(
    recipes: Sequence[Recipe],
    methods: Sequence[str],
    seeds: Seeds,
    path: Path,
    workers: int,
    progress: Progress,
    executor: str = "process",
) -> list[Search]:
    """Search every method's learning rate on every task, and test each at the chosen one.

    Method by method, so that a comparison that is stopped has few methods on all tasks.

    Args:
        path: file of the runs, which is read first; every run that ends is appended.
        workers, executor: see `run_all`.

    Returns:
        The searches, method by method; those that failed have a `problem`.

    Raises:
        ConfigError: a method that trains nothing; a recipe without validation examples; a file of
            runs on other data or by other code; another executor. See `grid`.
    """
    require_comparable(recipes, methods)
    require_executor(executor)
    for method in methods:
        if not find_method(method).trains:
            raise ConfigError(f"method {method!r} trains nothing and has no rate to tune")
    for recipe in recipes:
        if not recipe.data.has_validation:
            raise ConfigError(
                f"recipe of {recipe.task!r} has no examples to choose a learning rate by; add some,"
                " such as data.validation=200"
            )
    lines = read_lines([path]) if path.exists() else []
    searches = [
        Search(recipe, method, seeds) for method in dict.fromkeys(methods) for recipe in recipes
    ]
    for search in searches:
        for line in lines:
            if (line.task, line.method) == (search.recipe.task, search.method):
                search.take(line)
    comparison = _TunedComparison(recipes, searches, lines, path)
    with closing(EXECUTORS[executor](_work, comparison.calls(), workers)) as answers:
        for answer in answers:
            problem = DIED if answer.died else answer.result.get("problem")
            comparison.take(answer.number, answer.result, problem, progress)
    return searches


@dataclass
class _TunedComparison:
    """Searches in progress, and the file of their runs."""

    recipes: Sequence[Recipe]
    searches: list[Search]
    lines: list[RunLine]
    path: Path
    origins: dict[str, tuple[str, int]] = field(default_factory=dict)  # task → data, code
    # What each call was for.
    asked: list[tuple[Recipe, Search | None, Trial | None]] = field(default_factory=list)

    def calls(self) -> Iterator[tuple[dict[str, Any], _Job] | None]:
        """Yield calls of workers as they become possible; None before another answer."""
        for recipe in self.recipes:
            self.asked.append((recipe, None, None))
            yield as_tree(recipe), "fingerprint"
        while True:
            yield self._next_call()

    def _next_call(self) -> tuple[dict[str, Any], _Job] | None:
        for search in self.searches:
            if search.recipe.task not in self.origins:
                continue
            trial = search.next_trial()
            if trial is not None:
                search.running.add(trial)
                recipe = search.recipe_of(trial)
                self.asked.append((recipe, search, trial))
                return as_tree(recipe), "test" if trial.tested else "tune"
        return None

    def take(
        self, number: int, result: dict[str, Any], problem: str | None, progress: Progress
    ) -> None:
        """Record the outcome of a call, and report it."""
        recipe, search, trial = self.asked[number]
        if search is None or trial is None:
            self._take_origin(recipe, result, problem)
            return
        if problem is None:
            data, code = self.origins[recipe.task]
            settings = {"id": settings_digest(recipe), "settings": as_tree(recipe)}
            origin = {"data": data, "code": code, "tested": trial.tested}
            line = append_line(self.path, settings | origin | result["line"])
            search.losses[trial.position, trial.seed] = line.final_loss
            search.running.discard(trial)
        elif search.problem is None:
            search.problem = problem
        progress(search.name, trial, problem)

    def _take_origin(self, recipe: Recipe, result: dict[str, Any], problem: str | None) -> None:
        if problem is not None:
            for search in self.searches:
                if search.recipe.task == recipe.task:
                    search.problem = problem
            return
        origin = (result["data"], result["code"])
        tree = as_tree(recipe)
        for line in self.lines:
            same = line.task == recipe.task and line.tree()["data"] == tree["data"]
            if same and (line.data, line.code) != origin:
                raise ConfigError(
                    f"{str(self.path)!r} holds runs of {recipe.task!r} that were made with other"
                    f" examples, another checkpoint or another version of the task ({line.data},"
                    f" version {line.code}; now {origin[0]}, version {origin[1]}); name another"
                    " --out, or remove its lines"
                )
        self.origins[recipe.task] = origin


def _work(tree: dict[str, Any], job: _Job) -> dict[str, Any]:
    """Do a call in a worker; one that fails says so, and does not end the others."""
    from evatune.finetune.fingerprint import fingerprint
    from evatune.finetune.run import measure
    from evatune.finetune.tasks import find_domain

    quiet_worker()
    recipe = parse(tree)
    try:
        if job == "fingerprint":
            return {"data": fingerprint(recipe), "code": find_domain(recipe.domain).version}
        with tempfile.TemporaryDirectory() as folder:
            return {"line": measure(recipe, Path(folder), tested=job == "test")}
    except Exception as error:
        return {"problem": problem_of(error)}
