"""One fine-tuning run: a recipe in, a folder of results out.

transformers' Trainer does the training.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from evatune.api import initialize
from evatune.distributed.group import require_alone
from evatune.finetune.methods import AdapterSetup, Method, Preparation, find_method
from evatune.finetune.metrics import count_trainable, peak_memory, read_metrics
from evatune.finetune.recipe import Recipe
from evatune.finetune.resuming import newest_whole
from evatune.finetune.run_folder import (
    CALIBRATION,
    CHECKPOINTS,
    INITIAL_ADAPTER,
    MAKE_ROOM,
    RESULT,
    claimed_run,
    finished_result,
)
from evatune.finetune.tasks import Task, find_domain
from evatune.finetune.training import build_trainer
from evatune.trainers.hf import training_batches
from evatune.utils.atomic import write_text, writing
from evatune.utils.lock import held
from evatune.utils.names import resolved

# Endings of what Trainer's evaluation says about speed.
_ABOUT_SPEED = ("runtime", "per_second", "model_preparation_time")


def run(recipe: Recipe, folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train and evaluate, and write the results into the folder.

    A folder with a finished run of the same recipe is read instead, an unfinished one resumed.
    Written are `recipe.json`, `metrics.jsonl`, `adapter/` (or `model/`), `calibration.safetensors`
    where the method has one, Trainer's checkpoints while it runs, and last of all `result.json`.

    Returns:
        What `result.json` holds: score in [0, 1] (higher is better), eval_loss, measures (what else
            the task measures),
        trainable_parameters, first_gradient_b (norm of the gradient of all B at step 1, None
        without an adapter), init_seconds, train_seconds, steps.

    Raises:
        ConfigError: an unknown domain, task or method; a folder that holds another run, or in which
            another process works. DataError: data cannot be had.
    """
    find_domain(recipe.domain)
    find_method(recipe.method)
    require_alone("evatune train")
    folder = resolved(folder)  # what is checked here and what is written later are the same place
    result = finished_result(recipe, folder)
    if result is not None:
        return result
    with held(folder):
        result = finished_result(recipe, folder)  # by whoever held the folder until now
        if result is not None:
            return result
        with claimed_run(recipe, folder):
            return _run(recipe, folder, quiet)


def _run(recipe: Recipe, folder: Path, quiet: bool) -> dict[str, Any]:
    """Begin the run, or go on with it, and return its result."""
    transformers.set_seed(recipe.seed)
    method = find_method(recipe.method)
    task = find_domain(recipe.domain).prepare(recipe)
    checkpoint = newest_whole(folder / CHECKPOINTS)
    resumed = checkpoint is not None

    start = time.perf_counter()
    model = method.adapt(task.model, _adapter_setup(recipe, task))
    trainer = build_trainer(recipe, task, method, model, folder, resumed=resumed, quiet=quiet)
    _initialize(trainer, recipe, task, method, folder)
    init_seconds = time.perf_counter() - start

    transformers.set_seed(recipe.seed)  # whatever a method drew, all see the same batches
    start = time.perf_counter()
    if method.trains:
        _train(trainer, checkpoint, recipe.training.steps)
    train_seconds = time.perf_counter() - start

    measures = _evaluate(trainer, task, recipe.training.steps, folder)
    if method.trains:
        with writing(folder / method.saved_as, MAKE_ROOM):
            method.save(model, folder / method.saved_as, folder / INITIAL_ADAPTER)
    result = {
        "score": measures.pop("score"),
        "eval_loss": measures.pop("loss"),
        "measures": measures,
        "trainable_parameters": count_trainable(model),
        "first_gradient_b": _first_gradient_b(folder),
        "init_seconds": init_seconds,
        "train_seconds": train_seconds,  # of the last stretch, if the run was resumed
        "resumed": resumed,
        "steps": recipe.training.steps,
        "peak_memory_bytes": peak_memory(),
        "versions": _versions(),
    }
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    # of a thousand runs they would fill the disk
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return result


def _adapter_setup(recipe: Recipe, task: Task) -> AdapterSetup:
    return AdapterSetup(
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        targets=recipe.adapter.targets,
        task_type=task.task_type,
        head=task.head,
        new_head=task.new_head,
        steps=recipe.training.steps,
    )


def _initialize(trainer: Any, recipe: Recipe, task: Task, method: Method, folder: Path) -> None:
    """Start the adapter from data or weights, and write the calibration, where there is one."""
    preparation = Preparation(
        initialize=lambda **options: initialize(trainer, rows=task.rows, **options),
        batches=lambda size: training_batches(trainer, size, recipe.seed),
        rho=recipe.adapter.rho,
        budget=recipe.adapter.budget,
        scale=recipe.adapter.scale,
        seed=recipe.seed,
        initial_adapter=folder / INITIAL_ADAPTER,
        rows=task.rows,
    )
    calibration = method.prepare(trainer.model, preparation)
    if calibration is not None:
        calibration.save(folder / CALIBRATION)


def _train(trainer: Any, checkpoint: Path | None, steps: int) -> None:
    """Train from the checkpoint on; one of the last step is loaded and not trained further."""
    if checkpoint is None:
        trainer.train()
    elif checkpoint.name == f"checkpoint-{steps}":  # killed after the last step
        trainer._load_from_checkpoint(str(checkpoint))
        state_path = str(checkpoint / "trainer_state.json")
        trainer.state = transformers.TrainerState.load_from_json(state_path)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))


def _evaluate(trainer: Any, task: Task, steps: int, folder: Path) -> dict[str, Any]:
    """Return the measures after the last step by their names, loss and score among them."""
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    if evaluations and evaluations[-1]["step"] == steps:
        final = evaluations[-1]
    else:
        final = trainer.evaluate()
    measures = {}
    for key, value in final.items():
        if key.startswith("eval_") and not key.endswith(_ABOUT_SPEED):
            measures[key.removeprefix("eval_")] = value
    if task.evaluate is not None:
        measures |= task.evaluate(trainer.model.eval(), folder)
    return measures


def _first_gradient_b(folder: Path) -> float | None:
    """Return the norm of the gradient of all B at the first step; None without an adapter."""
    for line in read_metrics(folder):
        if "grad_norm_B" in line:
            return float(line["grad_norm_B"])
    return None


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
