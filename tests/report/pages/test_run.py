"""The page of a training run, with and without a run of LoRA beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evatune.finetune.metrics import METRICS
from evatune.finetune.recipe import Recipe, as_tree, parse
from evatune.finetune.run_folder import RECIPE, RESULT, reference_run
from evatune.report.pages.run import render
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
        {"step": 2, "eval_loss": loss, "eval_score": score, "seconds": 2.0},
    ]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe


def test_a_run_alone_shows_its_curves_and_names_the_comparison_as_next(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.75, scored=16, method="pissa")
    text = render(tmp_path / "run", recipe, "my recipe.yaml")
    page = Document(text)
    assert "Score 0.750 (accuracy, n = 16), evaluation loss 0.500; no run" in page.text
    assert "n = 16 says little: by chance alone accuracy moves by ±25 points" in page.text
    assert "evatune compare 'my recipe.yaml' --methods lora,pissa" in page.text
    assert "1,234 trainable parameters" in page.text
    plots = specs(text)
    assert plots.keys() == {"eval-loss", "score", "loss", "gradients", "seconds", "memory"}
    assert plots["memory"]["data"]["value"] == {"numbers": [5.0]}
    assert "torch version" in page.text


def test_loras_run_beside_it_is_drawn_beside_it(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.75, scored=99)
    other = {"training": {"learning_rate": 1e-2}}
    finished(tmp_path / "lora", 0.72, method="lora")
    finished(tmp_path / "lora-better", 0.73, 0.4, method="lora", **other)
    finished(tmp_path / "other-seed", 0.9, 0.1, method="lora", seed=1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RESULT).write_text("{")
    assert reference_run(recipe, tmp_path / "run") == tmp_path / "lora-better"
    text = render(tmp_path / "run", recipe, "understanding-bbc")
    page = Document(text)
    told = "2.0 points above LoRA's 0.730 with the same seed: one run each, so no evidence of a"
    assert f"{told} difference. n = 99 says little" in page.text
    assert specs(text)["score"]["data"]["method"]["words"] == ["eva", "lora"]
    assert f"evatune push {tmp_path / 'run' / 'adapter'} YOUR-NAME/bbc" in page.text


def test_a_run_on_the_users_data_has_no_size_to_say_and_no_short_command(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.75, data={"source": "mine.csv"})
    page = Document(render(tmp_path / "run", recipe, "own-understanding"))
    assert "Score 0.750, evaluation loss 0.500" in page.text
    assert "evatune compare" not in page.text


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    recipe = finished(tmp_path / "run", 0.1, float("nan"), method="full")
    page = Document(render(tmp_path / "run", recipe, "understanding-bbc"))
    assert "The run diverged" in page.text
    assert "no adapter" in page.text
