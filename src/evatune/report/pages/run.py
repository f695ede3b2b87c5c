"""The page of a training run of any method: what it reached, beside LoRA where that was run too."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evatune.calibration.result import Calibration
from evatune.finetune.methods import find_method
from evatune.finetune.metrics import read_metrics
from evatune.finetune.recipe import REFERENCE, Recipe
from evatune.finetune.recipe_tree import all_settings, as_tree
from evatune.finetune.run_folder import (
    RECIPE,
    read_evaluation,
    read_result,
    read_start,
    reference_run,
)
from evatune.report.charts import Curve, curves
from evatune.report.evaluation import HEADINGS, TITLE, evaluation_rows
from evatune.report.pages import calibration as start
from evatune.report.pages.base import (
    Chart,
    Page,
    Table,
    Tile,
    document,
    number_cell,
    text_cell,
)
from evatune.report.summary import Figures
from evatune.report.text import caution, rate_text, score_text
from evatune.report.text import verdict as start_verdict
from evatune.utils.names import short_name

_MEGABYTE = 2**20
_LOSS, _SCORE = "eval-loss", "score"  # the plots of what was evaluated while training
# title, name of the plot, keys of a line of metrics with what each adds to the method's name, and
# by what its figures are divided
_PLOTS: tuple[tuple[str, str, dict[str, str], float], ...] = (
    ("Test loss", _LOSS, {"eval_loss": ""}, 1),
    ("Score on test examples", _SCORE, {"eval_score": ""}, 1),
    ("Training loss", "loss", {"loss": ""}, 1),
    ("Gradient norm", "gradients", {"grad_norm_A": " A", "grad_norm_B": " B"}, 1),
    ("Seconds", "seconds", {"seconds": ""}, 1),
    ("Peak memory, MB", "memory", {"peak_memory_bytes": ""}, _MEGABYTE),
)
_VALIDATION = {_LOSS: "Validation loss", _SCORE: "Score on validation examples"}


@dataclass(frozen=True)
class FinishedRun:
    """The result and the metrics that a run has written.

    Attributes:
        name: of its method, and of its learning rate where that tells it from another run.
    """

    name: str
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]


def render(folder: Path, recipe: Recipe) -> str:
    """Return the page of the finished run in a folder as one HTML document."""
    result = read_result(folder)
    assert result is not None
    run = FinishedRun(recipe.method, result, read_metrics(folder))
    reference = _reference(recipe, folder)
    calibration = read_start(recipe, folder)
    page = Page(
        title=f"{recipe.method} on {recipe.task}",
        facts=_facts(recipe, calibration),
        verdict=verdict(run, reference),
        command=_command(recipe, folder, reference),
        tiles=_tiles(run),
        charts=charts([run] if reference is None else [run, reference], recipe),
        tables=[*_evaluation_tables(read_evaluation(folder)), _metrics_table(run.metrics)],
        settings={**all_settings(as_tree(recipe)), **_versions(result)},
    )
    return document(page if calibration is None else _with_start(page, calibration, recipe))


def _with_start(page: Page, calibration: Calibration, recipe: Recipe) -> Page:
    """Return the page with what the calibration found below what the training reached."""
    figures = Figures.of(calibration)
    scale = find_method(recipe.method).scale(recipe.adapter.scale)
    notes = [start_verdict(figures), *start.notes(figures, scale)]
    return replace(
        page,
        charts=[*page.charts, *start.charts(figures)],
        tables=[*page.tables, *start.tables(figures)],
        notes=notes,
        settings=start.recorded_settings(calibration, page.settings),
    )


def _reference(recipe: Recipe, folder: Path) -> FinishedRun | None:
    beside = reference_run(recipe, folder)
    result = None if beside is None else read_result(beside)
    if beside is None or result is None:
        return None
    return FinishedRun(REFERENCE, result, read_metrics(beside))


def model_name(recipe: Recipe) -> str:
    """Return the name of the model that a recipe begins with, for a header."""
    if recipe.model == "demo":
        return f"evatune's small model for {recipe.domain}"
    return short_name(recipe.model)


def _facts(recipe: Recipe, calibration: Calibration | None) -> dict[str, str]:
    adapter = recipe.adapter
    rho = None if calibration is None else calibration.config.rho
    has_adapter = find_method(recipe.method).saved_as == "adapter"
    shape = start.adapter_facts(adapter.rank, rho, adapter.alpha) if has_adapter else "no adapter"
    source = recipe.data.source
    return {
        "model": model_name(recipe),
        "data": f"{recipe.domain} / {recipe.task}" if source is None else short_name(source),
        "method": recipe.method,
        "r / ρ / α": shape,
        "learning rate": rate_text(recipe.training.learning_rate),
        "steps": str(recipe.training.steps),
        "seed": str(recipe.seed),
    }


def verdict(run: FinishedRun, reference: FinishedRun | None) -> str:
    """Return what the run reached, in a sentence, and whether it was measured on too little."""
    score, loss = run.result["score"], run.result["eval_loss"]
    if not math.isfinite(loss):
        return "The run diverged: its test loss is no number; try a smaller learning rate."
    reached = f"S{score_text(run.result)[1:]}"
    few = f" {doubt}." if (doubt := caution(run.result)) else ""
    if reference is None:
        return f"{reached}, test loss {loss:.3f}; no run of LoRA lies beside it.{few}"
    other = reference.result["score"]
    points = 100 * (score - other)
    if not math.isfinite(points):
        return f"{reached}; LoRA's run beside it diverged.{few}"
    side = "above" if points >= 0 else "below"
    return (
        f"{reached}, {abs(points):.1f} points {side} LoRA's {other:.3f} with the same seed: one run"
        f" each, so no evidence of a difference.{few}"
    )


def _command(recipe: Recipe, folder: Path, reference: FinishedRun | None) -> str:
    """Return the command to give next; empty where there is none."""
    method = find_method(recipe.method)
    if not method.trains:
        return ""
    if reference is None and recipe.method != REFERENCE:
        methods = f"{REFERENCE},{recipe.method}"
        return shlex.join(["evatune", "compare", str(folder / RECIPE), "--methods", methods])
    if method.saved_as == "adapter":
        repository = "YOUR-NAME/" + re.sub(r"[^a-zA-Z0-9_]+", "-", recipe.task).strip("-")
        return shlex.join(["evatune", "push", str(folder / method.saved_as), repository])
    return ""


def _tiles(run: FinishedRun) -> list[Tile]:
    result = run.result
    tiles = [
        Tile(f"{result['score']:.3f}", result["score_name"]),
        Tile(f"{result['eval_loss']:.3f}", "test loss"),
        Tile(f"{result['trainable_parameters']:,}", "trainable parameters"),
        Tile(f"{result['init_seconds']:.1f} s", "to initialize"),
        Tile(f"{result['train_seconds']:.1f} s", f"to train {result['steps']:,} steps"),
        Tile(f"{result['peak_memory_bytes'] / _MEGABYTE:,.0f} MB", "peak memory"),
    ]
    if result["first_gradient_b"] is not None:
        tiles.append(Tile(f"{result['first_gradient_b']:.3g}", "gradient norm of B at step 1"))
    return tiles


def charts(runs: Sequence[FinishedRun], recipe: Recipe) -> list[Chart]:
    """Return curves of one or several runs over their steps; without empty ones."""
    titles = _VALIDATION if recipe.data.has_validation else {}
    shown = []
    for title, name, keys, unit in _PLOTS:
        lines = [
            Curve(run.name + suffix, points)
            for run in runs
            for key, suffix in keys.items()
            if (points := _points(run.metrics, key, unit))
        ]
        if lines:
            names = [line.method for line in lines]
            spec = curves(lines, names, log=name == "gradients")
            shown.append(Chart(name, titles.get(name, title), spec))
    return shown


def _points(metrics: Sequence[Mapping[str, Any]], key: str, unit: float) -> list[tuple[int, float]]:
    """Return a figure at each step; the first one where several lines share a step."""
    points: dict[int, float] = {}
    for line in metrics:
        if key in line:
            points.setdefault(line["step"], line[key] / unit)
    return list(points.items())


def _evaluation_tables(tasks: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return the table of what `evatune evaluate` measured; none where it did not."""
    rows = [
        [
            text_cell(task),
            text_cell(metric),
            number_cell(score, ".4f"),
            number_cell(error, ".4f"),
            number_cell(examples, ",d"),
        ]
        for task, metric, score, error, examples in evaluation_rows(tasks)
    ]
    return [Table("evaluation", TITLE, HEADINGS, rows, folded=False)] if rows else []


def _metrics_table(metrics: Sequence[Mapping[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for line in metrics for key in line))
    rows = [
        [number_cell(line.get(key), ",.0f" if key in _WHOLE else ".4g") for key in keys]
        for line in metrics
    ]
    return Table("metrics", "All metrics", keys, rows)


_WHOLE = ("step", "peak_memory_bytes", "trainable_parameters")


def _versions(result: Mapping[str, Any]) -> dict[str, str]:
    return {f"{name} version": version for name, version in result["versions"].items()}
