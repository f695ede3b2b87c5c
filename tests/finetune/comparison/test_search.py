"""Tuned comparisons: order, resuming, and files that do not fit, with workers that are none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import pytest

from evatune.errors import ConfigError
from evatune.finetune.comparison import grid
from evatune.finetune.comparison.rate_rule import Seeds, Trial, chosen
from evatune.finetune.comparison.run_lines import read_lines
from evatune.finetune.comparison.search import Search, tune
from evatune.finetune.comparison.workers import Answer, Call
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load

SEEDS = Seeds((0, 1), (10, 11))
ORIGIN = {"data": "abc", "code": 1}


def recipe(task: str = "images-location", *overrides: str) -> Recipe:
    return load(task, ["data.validation=50", "training.learning_rate=1e-2", *overrides])


def measured(tree: dict[str, Any], job: str) -> dict[str, Any]:
    """Stand for a run, whose loss is smallest at the recipe's learning rate."""
    loss = abs(math.log(tree["training"]["learning_rate"] / 1e-2)) + 0.01 * tree["seed"]
    reached = {"loss": loss, "score": 1 / (1 + loss)}
    return {
        "curve": [[0, 9.0, 0.1], [10, loss, None]],
        "validation": reached,
        "test": reached if job == "test" else None,
        "diverged": False,
        "parameters": 5,
        "init_seconds": 0.5,
        "train_seconds": 1.0,
        "peak_memory_bytes": 7,
        "kappa": math.nan,
        "participation": 2.0,
        "ranks": None,
        "versions": {},
    }


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], str]]:
    """Replace workers by calls of `measured`, and return what is asked of them."""
    asked: list[tuple[dict[str, Any], str]] = []

    def answers(
        function: Callable[..., Any], calls: Iterable[Call | None], workers: int
    ) -> Generator[Answer]:
        for number, call in enumerate(takewhile(bool, calls)):
            tree, job = cast("Call", call)
            asked.append((tree, job))
            if tree["method"] == "dora":
                yield Answer(number, {"problem": "out of luck"})
            elif tree["method"] == "olora":
                yield Answer(number, died=True)
            elif job == "fingerprint":
                yield Answer(number, ORIGIN)
            else:
                yield Answer(number, {"line": measured(tree, job)})

    monkeypatch.setitem(grid.EXECUTORS, "process", answers)
    return asked


def tuned(path: Path, methods: list[str], *recipes: Recipe) -> list[Search]:
    return tune(recipes or [recipe()], methods, SEEDS, path, 1, lambda *_: None)


def test_methods_are_tuned_one_after_another_on_all_tasks_and_tested_at_the_chosen_rate(
    jobs: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "runs.jsonl"
    searches = tuned(path, ["lora", "eva"], recipe(), recipe("images-orientation"))
    assert [search.name for search in searches] == [
        "location, lora",
        "orientation, lora",
        "location, eva",
        "orientation, eva",
    ]
    lines = read_lines([path])
    assert len(lines) == 4 * (5 + 3 + 2)
    assert {line.rate for line in lines if line.tested} == {1e-2}
    assert {line.seed for line in lines if line.tested} == {10, 11}
    assert all((line.test is not None) == line.tested for line in lines)
    assert {(line.data, line.code) for line in lines} == {("abc", 1)}
    assert lines[0].kappa is None  # NaN is no JSON
    of_lora = [tree["method"] for tree, job in jobs if job != "fingerprint"]
    assert of_lora == sorted(of_lora, reverse=True)
    for search in searches:
        assert chosen(search.losses, search.seeds) == 0
        assert not search.diverged


def test_a_killed_comparison_goes_on_without_the_half_written_line(
    jobs: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "runs.jsonl"
    tuned(path, ["lora"])
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:6]) + whole[6][:20])
    jobs.clear()
    tuned(path, ["lora"])
    assert len(jobs) == 1 + len(whole) - 6
    assert sorted(path.read_text().splitlines()) == sorted("".join(whole).splitlines())


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(
    ("seeds", "text"),
    [
        (Seeds((5, 6), (0, 1)), r"location, lora: seed \d was chosen by before, .* be tested now"),
        (Seeds((10, 11), (20, 21)), r"location, lora: seed \d+ was tested before, .* choose now"),
    ],
)
def test_a_seed_does_not_choose_and_test_in_one_file(
    seeds: Seeds, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "runs.jsonl"
    tuned(path, ["lora"])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=text):
        tune([recipe()], ["lora"], seeds, path, 1, lambda *_: None)
    assert path.read_bytes() == before


def test_runs_on_other_data_or_by_other_code_are_refused(jobs: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    tuned(path, ["lora"])
    before = path.read_text()
    path.write_text(before.replace('"abc"', '"xyz"'))
    with pytest.raises(ConfigError, match=r"other examples, another checkpoint .*xyz, version 1"):
        tuned(path, ["eva"])
    path.write_text(before.replace('"code": 1', '"code": 0'))
    with pytest.raises(ConfigError, match="another version of the task"):
        tuned(path, ["eva"])


@pytest.mark.usefixtures("jobs")
def test_a_search_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    told: list[tuple[str, Trial, str | None]] = []
    searches = tune(
        [recipe()],
        ["dora", "olora", "lora"],
        SEEDS,
        tmp_path / "runs.jsonl",
        1,
        lambda *what: told.append(what),
    )
    problems = [search.problem for search in searches]
    assert problems[0] == "out of luck"
    assert "its process died" in str(problems[1])
    assert problems[2] is None
    assert len([line for line in told if line[2] is None]) == 10


@pytest.mark.usefixtures("jobs")
def test_a_line_that_is_none_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(ConfigError, match="has a line 1 that"):
        tuned(path, ["lora"])


@pytest.mark.usefixtures("jobs")
def test_without_validation_examples_or_without_a_rate_nothing_is_tuned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no examples to choose a learning rate by; add some"):
        tuned(tmp_path / "runs.jsonl", ["lora"], load("images-digits"))
    with pytest.raises(ConfigError, match="'untouched' trains nothing and has no rate to tune"):
        tuned(tmp_path / "runs.jsonl", ["lora", "untouched"])
