"""Many runs of one recipe: method × learning rate × seed, in parallel processes, each finished one kept."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.adapters.methods import require_method
from evatune.errors import ConfigError, EvatuneError
from evatune.recipes import Recipe, as_tree, parse
from evatune.tasks.run import RESULT, read_metrics


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    recipe: Recipe
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / RESULT).is_file()


@dataclass(frozen=True)
class Line:
    """A method at one learning rate, over seeds. Deviations are of the sample, None for a single seed."""

    method: str
    learning_rate: float
    seeds: int
    score: float
    score_deviation: float | None
    eval_loss: float
    steps_to_target: float | None  # mean over seeds; None unless every seed got there
    trainable_parameters: int
    init_seconds: float
    train_seconds: float
    curve: list[tuple[int, float, float | None]]  # step, mean evaluation loss, mean score where it was measured
    best: bool  # the method's learning rate of highest mean score


def grid(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], rates: Sequence[float], store: Path) -> list[Cell]:
    """The cells, seed by seed, so that an interrupted comparison has seen every method.

    A cell's folder is named after its settings, hash included: other settings never read its result.
    """
    for method in methods:
        require_method(method)
    if not methods or not seeds:
        raise ConfigError("a comparison needs at least one method and one seed, such as --methods lora,eva --seeds 0,1")
    cells = []
    for seed in dict.fromkeys(seeds):
        for method in dict.fromkeys(methods):
            for rate in dict.fromkeys(rates or [recipe.training.learning_rate]):
                tree = as_tree(recipe) | {"method": method, "seed": seed}
                one = parse(tree | {"training": tree["training"] | {"learning_rate": rate}}, "the comparison")
                digest = hashlib.sha256(json.dumps(as_tree(one), sort_keys=True).encode()).hexdigest()[:10]
                cells.append(Cell(one, store / f"{recipe.task}-{method}-lr{rate:g}-seed{seed}-{digest}"))
    return cells


def run_cells(cells: Sequence[Cell], workers: int, progress: Callable[[Cell, str | None], None]) -> dict[Path, str]:
    """Run what is not done yet, in processes of one thread each.

    Args:
        progress: called after each cell, with what went wrong or None.

    Returns:
        Folder → message for the cells that failed; the others went on.
    """
    waiting = [cell for cell in cells if not cell.done]
    for cell in cells:
        if cell.done:
            progress(cell, None)
    failed: dict[Path, str] = {}
    if not waiting:
        return failed
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they import torch
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=max(1, workers), mp_context=context) as pool:
            futures = {pool.submit(_run_one, as_tree(cell.recipe), str(cell.folder)): cell for cell in waiting}
            for future in as_completed(futures):
                cell = futures[future]
                try:
                    future.result()
                    problem = None
                except BrokenProcessPool:
                    problem = "its process died (out of memory?); run the same command again, with fewer --workers"
                except EvatuneError as error:
                    problem = str(error)
                except Exception as error:  # one failing cell must not end the others
                    problem = f"{type(error).__name__}: {error}"
                if problem is not None:
                    failed[cell.folder] = problem
                progress(cell, problem)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return failed


def _run_one(tree: dict[str, Any], folder: str) -> None:
    import warnings

    import datasets
    import torch
    import transformers

    from evatune.tasks.run import run

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    run(parse(tree), Path(folder), quiet=True)


def summarise(cells: Sequence[Cell], target_loss: float | None = None) -> tuple[list[Line], float | None]:
    """One line per method and learning rate from the cells that are done, and the target loss used.

    Args:
        target_loss: evaluation loss to reach. Default: the mean final one of the first method, at its best rate.
    """
    found: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        if cell.done:
            found.setdefault((cell.recipe.method, cell.recipe.training.learning_rate), []).append(cell)
    results = {
        key: [json.loads((c.folder / RESULT).read_text(encoding="utf-8")) for c in group] for key, group in found.items()
    }
    best: dict[str, float] = {}
    for method in dict.fromkeys(method for method, _ in found):
        best[method] = max(
            (rate for m, rate in found if m == method), key=lambda rate: _mean(r["score"] for r in results[method, rate])
        )
    if target_loss is None and best:
        first = next(iter(best))
        target_loss = _mean(result["eval_loss"] for result in results[first, best[first]])
    lines = []
    for (method, rate), group in found.items():
        some = results[method, rate]
        curves = [_curve(cell.folder, result["score"]) for cell, result in zip(group, some, strict=True)]
        reached = [next((step for step, loss, _ in curve if target_loss is not None and loss <= target_loss), None)
                   for curve in curves]  # fmt: skip
        steps = [step for step in reached if step is not None]
        scores = [result["score"] for result in some]
        lines.append(
            Line(
                method=method,
                learning_rate=rate,
                seeds=len(some),
                score=_mean(scores),
                score_deviation=statistics.stdev(scores) if len(scores) > 1 else None,
                eval_loss=_mean(result["eval_loss"] for result in some),
                steps_to_target=_mean(steps) if len(steps) == len(reached) else None,
                trainable_parameters=round(_mean(result["trainable_parameters"] for result in some)),
                init_seconds=_mean(result["init_seconds"] for result in some),
                train_seconds=_mean(result["train_seconds"] for result in some),
                curve=_mean_curve(curves),
                best=best[method] == rate,
            )
        )
    return lines, target_loss


def _curve(folder: Path, score: float) -> list[tuple[int, float, float | None]]:
    """Step, evaluation loss, score; a score that no evaluation measures is known after the last one."""
    lines = [line for line in read_metrics(folder) if "eval_loss" in line]
    return [
        (line["step"], line["eval_loss"], line.get("eval_score", score if line is lines[-1] else None)) for line in lines
    ]


def _mean_curve(curves: list[list[tuple[int, float, float | None]]]) -> list[tuple[int, float, float | None]]:
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
    return statistics.fmean(values)
