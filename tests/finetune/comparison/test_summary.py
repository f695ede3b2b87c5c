"""Figures of a comparison, from results that are planted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from evatune.finetune.comparison.grid import Run, grid
from evatune.finetune.comparison.summary import MeanStd, summarize
from evatune.finetune.metrics import METRICS
from evatune.finetune.recipe_tree import parse
from evatune.finetune.run_folder import RESULT

RESULT_FIELDS: dict[str, Any] = {
    "measures": {},
    "trainable_parameters": 10,
    "first_gradient_b": 1.0,
    "init_seconds": 1.0,
    "train_seconds": 1.0,
    "resumed": False,
    "steps": 2,
    "peak_memory_bytes": 1,
    "versions": {},
}


def finish(run: Run, score: float, losses: list[float]) -> None:
    """Write a finished run, whose test loss is 9 where it had validation examples."""
    run.folder.mkdir(parents=True)
    result = RESULT_FIELDS | {"score": score, "eval_loss": losses[-1]}
    if run.recipe.data.validation:
        reached = {"loss": losses[-1], "score": score / 2}
        result |= {"eval_loss": 9.0, "validation": reached}
    (run.folder / RESULT).write_text(json.dumps(result))
    lines = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    (run.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def planted(folder: Path, rates: list[float]) -> list[Run]:
    data = {"validation": 10 * (len(rates) > 1)}
    return grid([parse({"task": "bbc", "data": data})], ["lora", "eva"], [0, 1], rates, folder)


def test_means_deviations_and_steps_to_the_target_are_over_seeds(tmp_path: Path) -> None:
    for run in planted(tmp_path, [1e-3]):
        eva, seed = run.recipe.method == "eva", run.recipe.seed
        finish(run, 0.5 + 0.2 * seed, [2.0, 0.5, 0.1] if eva else [2.0, 1.5, 1.0 - seed / 2])
    lora, eva_line = summarize(planted(tmp_path, [1e-3])).lines
    assert lora.score == MeanStd(pytest.approx(0.6), pytest.approx(0.2 / math.sqrt(2)))
    assert lora.steps_to_target == MeanStd(2, 0)  # 1.0, which its worse seed reached at the end
    assert eva_line.steps_to_target == MeanStd(1, 0)
    assert eva_line.curve == [(0, 2.0, None), (1, 0.5, None), (2, 0.1, pytest.approx(0.6))]
    assert summarize(planted(tmp_path, [1e-3]), 0.2).lines[0].steps_to_target is None


def test_a_rate_at_which_a_run_diverged_is_not_the_best(tmp_path: Path) -> None:
    for run in planted(tmp_path, [1e-3, 1e-2]):
        diverged = run.recipe.training.learning_rate == 1e-2 and run.recipe.seed == 1
        finish(run, math.nan if diverged else 0.5, [math.nan if diverged else 1.0])
    lines = summarize(planted(tmp_path, [1e-3, 1e-2])).lines
    assert {line.learning_rate for line in lines if line.best} == {1e-3}
    diverged_line = next(line for line in lines if line.learning_rate == 1e-2)
    assert math.isnan(diverged_line.score.mean)
    assert math.isnan(diverged_line.score.deviation or 0)


def test_while_seeds_are_missing_rates_are_compared_by_those_that_all_have(tmp_path: Path) -> None:
    for run in planted(tmp_path, [1e-3, 1e-2]):
        is_higher = run.recipe.training.learning_rate == 1e-2
        if not (is_higher and run.recipe.seed == 1):
            finish(run, 0.5, [0.6 if is_higher else 0.5 + 0.5 * run.recipe.seed])
    lines = summarize(planted(tmp_path, [1e-3, 1e-2])).lines
    assert {line.learning_rate for line in lines if line.best} == {1e-3}


def test_the_best_rate_is_chosen_by_validation_and_not_by_the_score_that_is_reported(
    tmp_path: Path,
) -> None:
    for run in planted(tmp_path, [1e-3, 1e-2]):
        is_lower = run.recipe.training.learning_rate == 1e-3
        finish(run, 0.4 if is_lower else 0.9, [2.0, 0.5 if is_lower else 1.0])
    comparison = summarize(planted(tmp_path, [1e-3, 1e-2]))
    (best,) = (line for line in comparison.lines if line.best and line.method == "lora")
    assert (best.learning_rate, best.score.mean, best.eval_loss.mean) == (1e-3, 0.4, 9.0)
    assert best.curve[-1] == (1, 0.5, 0.2)
    assert comparison.targets == {"bbc": 0.5}


def test_runs_that_are_not_done_are_left_out(tmp_path: Path) -> None:
    runs = planted(tmp_path, [1e-3])
    assert summarize(runs).lines == []
    finish(runs[0], 0.5, [1.0])
    (line,) = summarize(runs).lines
    assert (line.method, line.seeds) == (runs[0].recipe.method, 1)
    assert line.score == MeanStd(0.5, None)


@pytest.mark.parametrize("diverged", [0, 1])
def test_the_target_is_what_seeds_reached_that_did_not_diverge(
    diverged: int, tmp_path: Path
) -> None:
    for run in planted(tmp_path, [1e-3]):
        lost = run.recipe.method == "lora" and run.recipe.seed == diverged
        finish(run, 0.5, [2.0, math.nan if lost else 1.0])
    comparison = summarize(planted(tmp_path, [1e-3]))
    assert comparison.targets == {"bbc": 1.0}
    assert [line.steps_to_target for line in comparison.lines] == [None, MeanStd(1, 0)]
