"""Many runs: task × method × learning rate × seed, in parallel, each finished one kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError, RecordError
from evatune.finetune.comparison.ray_workers import run_calls_on_ray
from evatune.finetune.comparison.run_lines import settings_digest
from evatune.finetune.comparison.workers import problem_of, run_calls
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_tree import as_tree, parse
from evatune.finetune.run_folder import read_result

EXECUTORS = {"process": run_calls, "ray": run_calls_on_ray}
DIED = "its process died (out of memory?); run the same command again, with fewer --workers"


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    recipe: Recipe
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """The run's result; None where it is not done, or damaged, which `run` says."""
        try:
            return read_result(self.folder)
        except RecordError:
            return None

    @property
    def done(self) -> bool:
        return self.result is not None


def grid(
    recipes: Sequence[Recipe],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    parent: Path,
) -> list[Run]:
    """Return the runs, seed by seed, so that an interrupted comparison has seen every method.

    A run's folder is named after its settings, hash included: other settings never read its result.

    Args:
        rates: learning rates; without any, that of the recipe. parent: of the folders.
    """
    require_comparable(recipes, methods)
    if len(_unique(rates)) > 1 and not all(recipe.data.has_validation for recipe in recipes):
        raise ConfigError(
            "of several learning rates the best would be chosen on the scores that are reported;"
            " add examples to choose by, such as data.validation=200, or give one rate"
        )
    if not methods or not seeds:
        raise ConfigError(
            "a comparison needs at least one method and one seed, such as --methods lora,eva"
            " --seeds 0,1"
        )
    runs = []
    for seed, recipe, method in product(_unique(seeds), recipes, _unique(methods)):
        for rate in _unique(rates) or [recipe.training.learning_rate]:
            runs.append(_run_of(recipe, method, seed, rate, parent))
    return runs


def require_comparable(recipes: Sequence[Recipe], methods: Sequence[str]) -> None:
    """Raise a ConfigError for an unknown method, or two recipes of one task."""
    for method in methods:
        find_method(method)
    if len({recipe.task for recipe in recipes}) < len(recipes):
        raise ConfigError(
            "two of the recipes have the same task; give each a task name of its own to compare"
            " them"
        )


def _unique(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _run_of(recipe: Recipe, method: str, seed: int, rate: float, parent: Path) -> Run:
    changed = variant(recipe, method, seed, rate)
    name = f"{recipe.task}-{method}-lr{rate:g}-seed{seed}-{settings_digest(changed)}"
    return Run(changed, parent / name)


def variant(recipe: Recipe, method: str, seed: int, rate: float) -> Recipe:
    """Return the recipe with another method, seed and learning rate."""
    tree = as_tree(recipe)
    training = tree["training"] | {"learning_rate": rate}
    changes = {"method": method, "seed": seed, "training": training}
    return parse(tree | changes, "the comparison")


def run_all(
    runs: Sequence[Run],
    workers: int,
    progress: Callable[[Run, str | None], None],
    executor: str = "process",
) -> dict[Path, str]:
    """Do the runs that are not done yet, each on one thread.

    Args:
        workers: processes at a time. On Ray the cluster decides: a run asks for one CPU.
        progress: called after each run, with what went wrong or None.
        executor: "process", or "ray": the cluster that the address in RAY_ADDRESS names, else this
            machine. Its machines must see the folders of the runs under the same paths.

    Returns:
        Folder → message for the runs that failed; the others went on.

    Raises:
        ConfigError: another executor, or Ray is not installed.
    """
    require_executor(executor)
    waiting = []
    for run in runs:
        if run.done:
            progress(run, None)
        else:
            waiting.append(run)
    failed: dict[Path, str] = {}
    if not waiting:
        return failed
    calls = [(as_tree(run.recipe), str(run.folder.absolute())) for run in waiting]
    # Closed at once, also when the interrupt comes in `progress`.
    with closing(EXECUTORS[executor](_run_in_worker, calls, workers)) as answers:
        for answer in answers:
            run = waiting[answer.number]
            problem = DIED if answer.died else answer.result
            if problem is not None:
                failed[run.folder] = problem
            progress(run, problem)
    return failed


def require_executor(name: str) -> None:
    """Raise a ConfigError for an executor that does not exist."""
    if name not in EXECUTORS:
        raise ConfigError(f"executor is {name!r}; choose one of {', '.join(EXECUTORS)}")


def _run_in_worker(tree: dict[str, Any], folder: str) -> str | None:
    """Do a run and return what went wrong, or None: one that fails must not end the others."""
    from evatune.finetune.run import run

    quiet_worker()
    try:
        run(parse(tree), Path(folder), quiet=True)
    except Exception as error:
        return problem_of(error)
    return None


def quiet_worker() -> None:
    """Have a worker compute on one thread, and keep libraries from telling what they do."""
    import torch

    from evatune.loading.quiet import quiet_libraries

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet_libraries()
