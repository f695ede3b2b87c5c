"""Many runs: task × method × learning rate × seed, in parallel, each finished one kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.errors import ConfigError, EvatuneError, RecordError
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe, as_tree, parse
from evatune.finetune.run import read_metrics, read_result
from evatune.finetune.workers import run_calls


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    recipe: Recipe
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run found; None where it is not done, or damaged, which `run` says."""
        try:
            return read_result(self.folder)
        except RecordError:
            return None

    @property
    def done(self) -> bool:
        return self.result is not None


@dataclass(frozen=True)
class MeanStd:
    """Mean over seeds, and the sample's standard deviation; None for a single seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class MethodSummary:
    """A method at one learning rate on one task, over seeds."""

    task: str
    method: str
    learning_rate: float
    seeds: int
    score: MeanStd
    eval_loss: MeanStd
    steps_to_target: MeanStd | None  # None unless every seed got there
    trainable_parameters: MeanStd
    # norm of the gradient of all B at step 1; None without an adapter
    first_gradient_b: MeanStd | None
    init_seconds: MeanStd
    train_seconds: MeanStd
    # step, mean evaluation loss, mean score where it was measured
    curve: list[tuple[int, float, float | None]]
    best: bool  # the method's learning rate of highest mean score on this task


@dataclass(frozen=True)
class Comparison:
    """All lines, task by task, and the evaluation loss to reach on each task."""

    lines: list[MethodSummary]
    targets: dict[str, float]

    def averages(self) -> dict[str, float]:
        """Method → mean over the tasks of its score at its best rate, for methods that are done on
        every task."""
        scores: dict[str, list[float]] = {}
        for line in self.lines:
            if line.best:
                scores.setdefault(line.method, []).append(line.score.mean)
        return {
            method: _mean(some) for method, some in scores.items() if len(some) == len(self.targets)
        }


def grid(
    recipes: Sequence[Recipe],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    store: Path,
) -> list[Run]:
    """The cells, seed by seed, so that an interrupted comparison has seen every method and task.

    A cell's folder is named after its settings, hash included: other settings never read its
    result.
    """
    for method in methods:
        find_method(method)
    if len({recipe.task for recipe in recipes}) < len(recipes):
        raise ConfigError(
            "two of the recipes have the same task; give each a task name of its own to compare"
            " them"
        )
    if not methods or not seeds:
        raise ConfigError(
            "a comparison needs at least one method and one seed, such as --methods lora,eva"
            " --seeds 0,1"
        )
    runs = []
    for seed in dict.fromkeys(seeds):
        for recipe in recipes:
            for method in dict.fromkeys(methods):
                for rate in dict.fromkeys(rates or [recipe.training.learning_rate]):
                    tree = as_tree(recipe) | {"method": method, "seed": seed}
                    one = parse(
                        tree | {"training": tree["training"] | {"learning_rate": rate}},
                        "the comparison",
                    )
                    digest = hashlib.sha256(
                        json.dumps(as_tree(one), sort_keys=True).encode()
                    ).hexdigest()[:10]
                    runs.append(
                        Run(one, store / f"{recipe.task}-{method}-lr{rate:g}-seed{seed}-{digest}")
                    )
    return runs


def run_all(
    runs: Sequence[Run],
    workers: int,
    progress: Callable[[Run, str | None], None],
    executor: str = "process",
) -> dict[Path, str]:
    """Run what is not done yet, each cell on one thread.

    Args:
        workers: processes at a time. On Ray the cluster decides: a cell asks for one CPU.
        progress: called after each cell, with what went wrong or None.
        executor: "process", or "ray": the cluster that the address in RAY_ADDRESS names, else this
            machine. Its machines must see the folders of the cells under the same paths.

    Returns:
        Folder → message for the cells that failed; the others went on.

    Raises:
        ConfigError: another executor, or Ray is not installed.
    """
    if executor not in _EXECUTORS:
        raise ConfigError(f"executor is {executor!r}; choose one of {', '.join(_EXECUTORS)}")
    waiting = []
    for run_ in runs:
        if run_.done:
            progress(run_, None)
        else:
            waiting.append(run_)
    failed: dict[Path, str] = {}
    if waiting:
        # Closed at once, also when the interrupt comes in `progress`.
        with closing(_EXECUTORS[executor](waiting, workers)) as ended:
            for run_, problem in ended:
                if problem is not None:
                    failed[run_.folder] = problem
                progress(run_, problem)
    return failed


def _in_processes(runs: Sequence[Run], workers: int) -> Generator[tuple[Run, str | None]]:
    calls = [(as_tree(run_.recipe), str(run_.folder)) for run_ in runs]
    with closing(run_calls(_run_one, calls, workers)) as answers:
        for answer in answers:
            yield runs[answer.number], _DIED if answer.died else answer.result


def _on_ray(runs: Sequence[Run], workers: int) -> Generator[tuple[Run, str | None]]:
    where: dict[str, Any] = {}
    if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
        where = {"address": "local", "num_cpus": max(1, workers)}
        # Read when Ray is imported: as on a Mac, it then listens on the loopback address alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed; install it with: pip install 'evatune[ray]'"
        ) from error
    started_here = not ray.is_initialized()
    futures: dict[Any, Run] = {}
    try:
        if started_here:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False, **where)
        task = ray.remote(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(_run_one)
        futures = {
            task.remote(as_tree(run_.recipe), str(run_.folder.absolute())): run_ for run_ in runs
        }
        while futures:
            (done,), _ = ray.wait(list(futures), num_returns=1)
            run_ = futures.pop(done)
            try:
                problem = ray.get(done)
            except ray.exceptions.RayError:
                problem = _DIED
            yield run_, problem
    finally:
        for future in futures:
            ray.cancel(future, force=True)
        if started_here:
            ray.shutdown()


_EXECUTORS = {"process": _in_processes, "ray": _on_ray}


_DIED = "its process died (out of memory?); run the same command again, with fewer --workers"


def _run_one(tree: dict[str, Any], folder: str) -> str | None:
    """Run a cell in a worker; what went wrong, or None. One failing cell must not end the
    others."""
    import warnings

    import datasets
    import torch
    import transformers

    from evatune.finetune.run import run

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        run(parse(tree), Path(folder), quiet=True)
    except EvatuneError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def summarise(runs: Sequence[Run], target_loss: float | None = None) -> Comparison:
    """One line per task, method and learning rate from the cells that are done.

    Args:
        target_loss: evaluation loss to reach. Default: per task what every seed of the first method
            reached, at its best rate.
    """
    found: dict[tuple[str, str, float], list[Run]] = {}
    results: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for run_ in runs:
        result = run_.result
        if result is not None:
            recipe = run_.recipe
            key = recipe.task, recipe.method, recipe.training.learning_rate
            found.setdefault(key, []).append(run_)
            results.setdefault(key, []).append(result)
    best: dict[tuple[str, str], float] = {}
    for task, method, _ in found:
        others = [r for t, m, r in found if (t, m) == (task, method)]
        best[task, method] = max(others, key=lambda r: _score(results[task, method, r]))
    targets: dict[str, float] = {}
    for (task, method), rate in best.items():
        if task not in targets:  # the first method
            first = max(result["eval_loss"] for result in results[task, method, rate])
            targets[task] = first if target_loss is None else target_loss
    lines = []
    for (task, method, rate), group in found.items():
        some = results[task, method, rate]
        curves = [
            _curve(run_.folder, result["score"]) for run_, result in zip(group, some, strict=True)
        ]
        steps = [
            next((step for step, loss, _ in curve if loss <= targets[task]), None)
            for curve in curves
        ]
        gradients = [result["first_gradient_b"] for result in some]
        reached = [step for step in steps if step is not None]
        lines.append(
            MethodSummary(
                task=task,
                method=method,
                learning_rate=rate,
                seeds=len(some),
                first_gradient_b=None if None in gradients else _spread(gradients),
                steps_to_target=_spread(reached) if len(reached) == len(steps) else None,
                curve=_mean_curve(curves),
                best=best[task, method] == rate,
                **{key: _spread([result[key] for result in some]) for key in _MEASURED},
            )
        )
    return Comparison(sorted(lines, key=lambda line: line.task), targets)


_MEASURED = ("score", "eval_loss", "trainable_parameters", "init_seconds", "train_seconds")


def _score(results: Sequence[Mapping[str, float]]) -> float:
    """To choose by: a run that diverged is the worst."""
    mean = _mean(result["score"] for result in results)
    return -math.inf if math.isnan(mean) else mean


def _spread(values: Sequence[float]) -> MeanStd:
    """Of runs some of which diverged, neither is a number."""
    if len(values) == 1:
        return MeanStd(_mean(values), None)
    known = all(map(math.isfinite, values))
    return MeanStd(_mean(values), statistics.stdev(values) if known else math.nan)


def _curve(folder: Path, score: float) -> list[tuple[int, float, float | None]]:
    """Step, evaluation loss, score; a score that no evaluation measures is known after the last
    one."""
    lines = [line for line in read_metrics(folder) if "eval_loss" in line]
    return [
        (
            line["step"],
            line["eval_loss"],
            line.get("eval_score", score if line is lines[-1] else None),
        )
        for line in lines
    ]


def _mean_curve(
    curves: list[list[tuple[int, float, float | None]]],
) -> list[tuple[int, float, float | None]]:
    """The mean over seeds at the steps that every seed has."""
    if not curves:
        return []
    by_step = [{step: (loss, score) for step, loss, score in curve} for curve in curves]
    common = sorted(set.intersection(*(set(points) for points in by_step)))
    found = []
    for step in common:
        losses, scores = zip(*(points[step] for points in by_step), strict=True)
        found.append((step, _mean(losses), None if None in scores else _mean(scores)))
    return found


def _mean(values: Any) -> float:
    values = list(values)
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan
