"""One run: what it trains, reports and saves, and that a killed one goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from evatune.errors import ProcessError
from evatune.finetune.methods import METHODS
from evatune.finetune.methods.eva import Eva, MinorDirections
from evatune.finetune.metrics import read_metrics
from evatune.finetune.run import run
from evatune.finetune.run_folder import RESULT
from evatune.finetune.tasks import understanding
from tests.finetune.helpers import NARROW_TARGETS, SMALL, command_line, evaluations, small
from tests.processes import FORKS

torch.set_num_threads(1)


# One of each kind of adapter and of each change to the base's weights.
RELOADED = {"lora", "pissa", "olora", "milora", "corda", "lora-ga", "mica", "eva", "eva-dora"}
# AdaLoRA has other matrices; the others freeze A.
NO_GRADIENT_OF_A = {"adalora", "lora-fa", "eva-fa"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_reports(method: str, bert_folder: Path, tmp_path: Path) -> None:
    options = ["training.learning_rate=0.01", *NARROW_TARGETS.get(method, [])]
    recipe = small(bert_folder, f"method={method}", *options)
    result = run(recipe, tmp_path / "run", quiet=True)
    assert 0 <= result["score"] <= 1
    assert (result["trainable_parameters"] > 0) == (method != "untouched")
    lines = read_metrics(tmp_path / "run")
    if method == "untouched":
        return
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    if METHODS[method].saved_as == "adapter":
        assert (
            all({"grad_norm_A"} <= line.keys() for line in lines if "loss" in line)
            or method in NO_GRADIENT_OF_A
        )
    assert (tmp_path / "run" / "calibration.safetensors").exists() == (
        isinstance(METHODS[method], (Eva, MinorDirections))
    )
    if method in RELOADED:
        saved_loss = loss_of_saved(tmp_path / "run" / "adapter", bert_folder)
        assert saved_loss == pytest.approx(result["eval_loss"], abs=1e-4)


@torch.no_grad()
def loss_of_saved(adapter: Path, base: Path) -> float:
    """Return the test loss of an adapter on the base model as it was, by PEFT alone."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    model = PeftModel.from_pretrained(plain, str(adapter)).eval()
    task = understanding.prepare(small(base))
    return float(model(**task.collator(list(task.test))).loss)


def test_the_ranks_of_lora_redist_are_evas_and_its_directions_are_not(
    bert_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    for method in ("eva", "lora-redist"):
        run(
            small(bert_folder, f"method={method}", "training.learning_rate=1e-9"),
            tmp_path / method,
            quiet=True,
        )
    ours, random = (
        load_file(tmp_path / m / "adapter" / "adapter_model.safetensors")
        for m in ("eva", "lora-redist")
    )
    a = [key for key in ours if "lora_A" in key]
    assert {key: ours[key].shape for key in a} == {key: random[key].shape for key in a}
    assert not any(torch.allclose(ours[key], random[key]) for key in a)


def test_equal_seeds_give_equal_runs(bert_folder: Path, tmp_path: Path) -> None:
    first, second = (run(small(bert_folder), tmp_path / name, quiet=True) for name in ("a", "b"))
    assert first["eval_loss"] == second["eval_loss"]


def test_a_process_whose_others_cannot_be_found_says_so(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProcessError, match="one of 2 processes, but RANK is not set"):
        run(small(bert_folder), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def holds_json(path: Path) -> bool:
    """Return whether the file is there, and whole."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


@pytest.mark.parametrize("method", ["eva", "lora-ga"])  # one that changes the base's weights
def test_a_killed_run_resumes_and_ends_like_one_that_was_not(
    method: str, bert_folder: Path, tmp_path: Path
) -> None:
    recipe = small(bert_folder, f"method={method}", "training.steps=12")
    whole = run(recipe, tmp_path / "whole", quiet=True)
    settings = [*SMALL, f"model={bert_folder}", f"method={method}", "training.steps=12"]
    out = tmp_path / "killed"
    arguments = (str(tmp_path), "train", "understanding-bbc", *settings, "--out", str(out))
    process = FORKS.Process(target=command_line, args=arguments)
    process.start()
    deadline = time.monotonic() + 120
    state = out / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    while not holds_json(state) and time.monotonic() < deadline:
        assert process.exitcode is None or (out / RESULT).exists()
        time.sleep(0.005)
    process.kill()
    process.join()
    resumed = run(recipe, out, quiet=True)
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    losses = [
        [line["loss"] for line in read_metrics(folder) if "loss" in line]
        for folder in (tmp_path / "whole", out)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert evaluations(out) == pytest.approx(evaluations(tmp_path / "whole"), abs=1e-6)
