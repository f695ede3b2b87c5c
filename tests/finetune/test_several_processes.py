"""Runs of several processes, as a launcher would start them: gloo on this machine."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from evatune import Calibration
from evatune.finetune.recipe import Recipe
from evatune.finetune.run import run
from evatune.utils.launcher import is_main_process
from tests.finetune.helpers import command_line, small
from tests.processes import error_of, launched

# Whole batches for both: of a last one that is filled up, Trainer's loss is a little off.
_TWO = ("data.validation=32", "data.test=32")


def _run_all(recipes: dict[str, Recipe], folder: Path) -> None:
    found = {name: run(recipe, folder / name, quiet=True) for name, recipe in recipes.items()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def test_two_processes_train_like_one_and_say_the_same(steady_bert: Path, tmp_path: Path) -> None:
    recipes = {
        name: small(steady_bert, f"method={name}", *_TWO) for name in ("lora", "eva", "pissa")
    }
    assert launched(_run_all, recipes, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name in ("lora", "pissa"):  # EVA's calibration is in another order
        alone = run(recipes[name], tmp_path / f"{name}-alone", quiet=True)
        assert first[name]["score"] == alone["score"]
        assert first[name]["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)
        assert first[name]["first_gradient_b"] == pytest.approx(alone["first_gradient_b"], rel=1e-3)
        tensors, others = (
            load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")
            for folder in (name, f"{name}-alone")
        )
        torch.testing.assert_close(tensors, others, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "eva" / "calibration.safetensors").exists()


def _fail(recipes: dict[str, Recipe], folder: Path) -> None:
    errors = {
        name: error_of(partial(run, recipe, folder / name)) for name, recipe in recipes.items()
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(errors))


def test_a_mistake_ends_all_processes_with_one_sentence(steady_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    recipes = {
        "odd": small(steady_bert, "training.batch_size=7"),
        "taken": small(steady_bert),
    }
    assert launched(_fail, recipes, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert "7, which 2 processes cannot share; give a multiple of 2" in first["odd"][1]
    assert first["odd"] == second["odd"]
    assert "holds no run of evatune" in first["taken"][1]
    assert second["taken"][0] == "ProcessError"
    assert "process 0 of 2 stopped, and so do all: ConfigError: " in second["taken"][1]
    assert {path.name for path in tmp_path.iterdir()} == {"0.json", "1.json", "taken"}


class _KillSelf(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3 and not is_main_process():
            os.kill(os.getpid(), signal.SIGKILL)


def _be_killed(recipe: Recipe, folder: Path) -> None:
    from evatune.finetune import training

    training._AfterStep.on_step_end = _KillSelf.on_step_end  # type: ignore[method-assign]
    kind, message = error_of(lambda: run(recipe, folder / "run", quiet=True))
    (folder / "error").write_text(f"{kind}: {message}")


def test_a_killed_process_ends_the_others_and_all_go_on(steady_bert: Path, tmp_path: Path) -> None:
    recipe = small(steady_bert, "method=lora", *_TWO)
    assert launched(_be_killed, recipe, tmp_path) == [0, -signal.SIGKILL]
    assert (tmp_path / "error").read_text().startswith("ProcessError: ")
    assert launched(_run_all, {"run": recipe}, tmp_path) == [0, 0]
    result = json.loads((tmp_path / "0.json").read_text())["run"]
    assert result["resumed"]
    alone = run(recipe, tmp_path / "alone", quiet=True)
    assert result["score"] == alone["score"]
    assert result["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)


def test_an_adapter_is_initialized_by_two_processes_and_written_by_one(
    steady_bert: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"w{number} w{number % 7} w3\n" for number in range(64)))
    options = [*("--model", steady_bert, "--data", texts), *("--rank", 4, "--batch-size", 8)]
    arguments = ["init", *map(str, options), "--out"]
    for place in ("first", "again"):
        assert launched(command_line, str(tmp_path), *arguments, str(tmp_path / "out")) == (
            [0, 0] if place == "first" else [2, 2]
        )
    assert Calibration.load(tmp_path / "out" / "calibration.safetensors").processes == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "run.json"}
