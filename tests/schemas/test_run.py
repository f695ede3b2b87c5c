"""Recipes, results and metrics of runs: what is damaged is told, and passed over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from evatune.errors import ConfigError, RecordError
from evatune.finetune.comparison.grid import Run
from evatune.finetune.comparison.summary import summarize
from evatune.finetune.metrics import read_metrics
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run
from tests.fuzzing import fuzz


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=.inf",
        "training.learning_rate=.nan",
        "training.steps=true",
        "training.steps=1e18",
        "training.steps=2.5",
        "adapter.rank=1e9",
        "adapter.alpha=.inf",
        "seed=true",
        "data.train=-1",
        "training.warmup=.nan",
        "task=5",
        "data.columns=[1]",
    ],
)
def test_settings_out_of_bounds_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}[^\n]* is "):
        load("understanding-bbc", [override])


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    assert (
        load("understanding-bbc", ["data.train=1e3", "training.learning_rate=1"]).data.train == 1000
    )


def finished(folder: Path) -> Path:
    folder.mkdir()
    fuzz.write_run(folder, "result.json")
    return folder


@pytest.mark.parametrize(
    "damage", ["", "{", "null", '{"score": 0.5}', "[" * 10_000, '{"score": "high"}']
)
def test_a_damaged_result_is_told_and_does_not_end_a_comparison(
    damage: str, tmp_path: Path
) -> None:
    recipe = load("understanding-bbc")
    cells = [Run(recipe, finished(tmp_path / "good")), Run(recipe, finished(tmp_path / "bad"))]
    (tmp_path / "bad" / "result.json").write_text(damage)
    assert [cell.done for cell in cells] == [True, False]
    assert [line.seeds for line in summarize(cells).lines] == [1]
    with pytest.raises(
        RecordError, match=r"bad/result\.json.*remove it, and the run is done again"
    ):
        run(recipe, tmp_path / "bad")


def test_runs_that_diverged_are_compared(tmp_path: Path) -> None:
    cells = [Run(load("understanding-bbc"), finished(tmp_path / name)) for name in "ab"]
    path = tmp_path / "a" / "result.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"eval_loss": float("nan"), "score": float("inf")}
        )
    )
    (line,) = summarize(cells).lines
    assert line.seeds == 2
    assert line.eval_loss.mean != line.eval_loss.mean


@pytest.mark.parametrize(
    "damage",
    ['{"step": "1"}', '{"step": 1, "loss": "low"}', "nonsense", '{"step": 1, "step": 2}', "\xff"],
)
def test_damaged_lines_of_metrics_are_left_out_and_said(damage: str, tmp_path: Path) -> None:
    path = finished(tmp_path / "run") / "metrics.jsonl"
    good = path.read_text().splitlines()
    path.write_bytes("\n".join([good[0], damage, *good[1:], '{"step": 9, "lo']).encode("latin-1"))
    with pytest.warns(UserWarning, match=r"line 2 of .*metrics\.jsonl' is left out") as said:
        lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert len(said) == 1  # half a line at the end is a killed run's


@pytest.mark.parametrize(
    "damage", ["[", '{"task": 5}', "null", '{"task": "bbc", "tsk": 1}', '{"task": 1, "task": 2}']
)
def test_a_damaged_recipe_of_a_run_is_told(damage: str, tmp_path: Path) -> None:
    (finished(tmp_path / "run") / "recipe.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"recipe\.json.*cannot go on"):
        run(load("understanding-bbc"), tmp_path / "run")


def test_a_run_without_a_permission_is_another_than_one_with_it(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load("understanding-bbc"), trust_remote_code=True)
    with pytest.raises(ConfigError, match="trust_remote_code is "):
        run(recipe, finished(tmp_path / "run"))
