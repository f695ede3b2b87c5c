"""The page of a training run, with and without a run of LoRA beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import evatune
from evatune.finetune.metrics import METRICS
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_tree import as_tree, parse
from evatune.finetune.run_folder import RECIPE, RESULT, reference_run
from evatune.report.pages.run import render
from evatune.utils.names import CALIBRATION_FILE
from tests.helpers import Toy, inputs
from tests.report.pages.helpers import Document, specs

RESULT_FIELDS: dict[str, Any] = {
    "measures": {},
    "trainable_parameters": 1234,
    "first_gradient_b": 1.0,
    "init_seconds": 1.0,
    "train_seconds": 2.0,
    "resumed": False,
    "steps": 2,
    "peak_memory_bytes": 5_000_000,
    "versions": {"torch": "9.9"},
}


def finished(
    folder: Path, score: float, loss: float = 0.5, scored: int | None = None, **settings: Any
) -> Recipe:
    """A folder of a finished run, without its adapter."""
    folder.mkdir()
    recipe = parse({"task": "bbc"} | settings)
    (folder / RECIPE).write_text(json.dumps(as_tree(recipe)))
    result = {"score": score, "score_name": "accuracy", "scored": scored, "eval_loss": loss}
    (folder / RESULT).write_text(json.dumps(RESULT_FIELDS | result))
    lines = [
        {"step": 0, "eval_loss": 2.0, "eval_score": 0.1, "seconds": 0.1},
        {"step": 1, "loss": 1.0, "grad_norm_B": 1.0, "peak_memory_bytes": 5_000_000},
        {"step": 2, "loss": 0.9, "seconds": 2.0},
        {"step": 2, "eval_loss": loss, "eval_score": score, "seconds": 30.0},
    ]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe


def test_a_run_alone_shows_its_curves_and_names_the_comparison_as_next(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.75, scored=16, method="pissa")
    text = render(tmp_path / "run", recipe)
    page = Document(text)
    assert "Score 0.750 (accuracy, n = 16), test loss 0.500; no run" in page.text
    assert "n = 16 says little: by chance alone accuracy moves by ±25 points" in page.text
    assert f"evatune compare {tmp_path / 'run' / RECIPE} --methods lora,pissa" in page.text
    assert "1,234 trainable parameters" in page.text
    plots = specs(text)
    assert plots.keys() == {"eval-loss", "score", "loss", "gradients", "seconds", "memory"}
    assert plots["seconds"]["data"]["value"] == {"numbers": [0.1, 2.0]}  # of a step, the first
    assert plots["memory"]["data"]["value"] == {"numbers": [pytest.approx(5_000_000 / 2**20)]}
    assert "torch version" in page.text


def test_curves_are_named_after_the_examples_that_they_are_of(tmp_path: Path) -> None:
    titles = {
        "test": ("Test loss", "Score on test examples"),
        "validation": ("Validation loss", "Score on validation examples"),
    }
    for part, size in (("test", 0), ("validation", 10)):
        recipe = finished(tmp_path / part, 0.75, data={"validation": size})
        text = Document(render(tmp_path / part, recipe)).text
        assert "0.500 test loss" in text
        for other, (loss, score) in titles.items():
            assert (loss in text, score in text) == (other == part, other == part)


def test_settings_have_those_at_their_default(tmp_path: Path) -> None:
    text = Document(render(tmp_path / "run", finished(tmp_path / "run", 0.75))).text
    assert "training.max_grad_norm" in text


def test_loras_run_beside_it_is_drawn_beside_it(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.75, scored=99)
    other = {"training": {"learning_rate": 1e-2}}
    finished(tmp_path / "lora", 0.72, method="lora")
    finished(tmp_path / "lora-better", 0.73, 0.4, method="lora", **other)
    finished(tmp_path / "other-seed", 0.9, 0.1, method="lora", seed=1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RESULT).write_text("{")
    assert reference_run(recipe, tmp_path / "run") == tmp_path / "lora-better"
    text = render(tmp_path / "run", recipe)
    page = Document(text)
    told = "2.0 points above LoRA's 0.730 with the same seed: one run each, so no evidence of a"
    assert f"{told} difference. n = 99 says little" in page.text
    assert specs(text)["score"]["data"]["method"]["words"] == ["eva", "lora"]
    assert f"evatune push {tmp_path / 'run' / 'adapter'} YOUR-NAME/bbc" in page.text


def test_a_run_on_the_users_data_has_no_size_to_say(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "my run", 0.75, data={"source": "my own.csv"})
    page = Document(render(tmp_path / "my run", recipe))
    assert "Score 0.750, test loss 0.500" in page.text
    assert f"evatune compare '{tmp_path / 'my run' / RECIPE}' --methods lora,eva" in page.text
    finished(tmp_path / "lora", 0.72, method="lora", data={"source": "my own.csv"})
    page = Document(render(tmp_path / "my run", recipe))
    assert f"evatune push '{tmp_path / 'my run' / 'adapter'}' YOUR-NAME/bbc" in page.text


def test_lora_runs_that_diverged_do_not_hide_one_that_did_not(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.75)
    finished(tmp_path / "a", 0.2, float("nan"), method="lora")
    better = {"training": {"learning_rate": 1e-4}}
    finished(tmp_path / "b", 0.72, method="lora", **better)
    assert reference_run(recipe, tmp_path / "run") == tmp_path / "b"


@pytest.mark.parametrize("method", ["eva", "eva-paper-random", "eva-shuffled", "lora-redist"])
def test_a_control_does_not_say_that_its_start_is_evas(method: str, tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.75, method=method)
    calibration = evatune.calibrate(Toy(), inputs(), evatune.CalibrationConfig(rank=4))
    calibration.save(tmp_path / "run" / CALIBRATION_FILE)
    text = Document(render(tmp_path / "run", recipe)).text
    assert ("The chosen directions hold" in text) == (method == "eva")


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.1, float("nan"), method="full")
    page = Document(render(tmp_path / "run", recipe))
    assert "The run diverged" in page.text
    assert "no adapter" in page.text
