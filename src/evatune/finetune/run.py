"""One fine-tuning run: a recipe in, a folder of results out.

transformers' Trainer does the training.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers

from evatune.api import initialize
from evatune.calibration import Calibration
from evatune.calibration.progress import ProgressOption
from evatune.distributed.group import ProcessGroup
from evatune.distributed.launch import launched
from evatune.finetune.another_task import another_task
from evatune.finetune.compatibility import require_compatible
from evatune.finetune.fingerprint import data_fingerprint
from evatune.finetune.methods import AdapterSetup, Method, Preparation, find_method
from evatune.finetune.methods.base import EvaOptions
from evatune.finetune.metrics import count_trainable, peak_memory, read_metrics, reset_peak_memory
from evatune.finetune.recipe import Recipe
from evatune.finetune.resuming import newest_whole
from evatune.finetune.run_folder import (
    CHECKPOINTS,
    INITIAL_ADAPTER,
    RESULT,
    RESUME_ADVICE,
    claimed_run,
    finished_result,
)
from evatune.finetune.sharding import whole_weights
from evatune.finetune.start_facts import start_facts
from evatune.finetune.tasks import ModelKind, Part, Task, find_domain
from evatune.finetune.tasks.quantization import keep_trainable
from evatune.finetune.training import build_trainer, training_shown
from evatune.trainers.hf import training_batches
from evatune.utils.atomic import write_text, writing
from evatune.utils.lock import lock_folder
from evatune.utils.names import CALIBRATION_FILE, resolved

# Endings of what Trainer's evaluation says about speed.
_ABOUT_SPEED = ("runtime", "per_second", "model_preparation_time")


def _say_nothing(sentence: str) -> None:
    """Ignore the sentence."""


def run(
    recipe: Recipe,
    folder: Path,
    *,
    quiet: bool = False,
    say: Callable[[str], object] = _say_nothing,
    task: Task | None = None,
) -> dict[str, Any]:
    """Train and evaluate, and write the results into the folder.

    A folder with a finished run of the same recipe is read instead, an unfinished one resumed. As
    one of several processes that a launcher started it shares the work with the others, and the
    first one writes. Written are `recipe.json`, `metrics.jsonl`, `adapter/` (or `model/`),
    `calibration.safetensors` where the method has one, Trainer's checkpoints while it runs, and
    last of all `result.json`.

    Args:
        quiet: draw no bar. say: is told in a sentence what data of the user's were taken for.
        task: the recipe's, where it is prepared already.

    Returns:
        What `result.json` holds: score in [0, 1] (higher is better), score_name (what it is),
            scored (on how many examples or episodes), eval_loss, measures (what else the task
            measures), all of the test examples; validation, the same of the validation examples,
            None without; trainable_parameters; first_gradient_b (norm of the gradient of all B at
            step 1, None without an adapter); init_seconds, train_seconds, steps.

    Raises:
        ConfigError: an unknown domain, task or method; a folder that holds another run, or in which
            another process works. DataError: data cannot be had.
    """
    find_domain(recipe.domain)
    require_compatible(find_method(recipe.method), recipe)
    folder = resolved(folder)  # what is checked here and what is written later are the same place
    with launched() as process_group, _claimed(recipe, folder, process_group) as finished:
        if finished is not None:
            return finished
        newest = newest_whole(folder / CHECKPOINTS) if process_group.rank == 0 else None
        shared = process_group.gather(None if newest is None else str(newest))[0]
        checkpoint = None if shared is None else Path(shared)
        result: dict[str, Any] = {}
        with process_group.library_messages():
            if process_group.rank == 0:
                result = _run(recipe, folder, checkpoint, quiet, say, task)
            else:
                _take_part(recipe, folder, checkpoint, task)
        return dict(process_group.gather(result)[0])


@contextmanager
def _claimed(
    recipe: Recipe, folder: Path, process_group: ProcessGroup
) -> Iterator[dict[str, Any] | None]:
    """Yield what a finished run has written; else None, with the folder held for this run."""
    result = None
    with ExitStack() as stack:
        if process_group.rank == 0:  # which looks after the folder for all
            result = finished_result(recipe, folder)
            if result is None:
                stack.enter_context(lock_folder(folder))
                result = finished_result(recipe, folder)  # by whoever held the folder until now
            if result is None:
                stack.enter_context(claimed_run(recipe, folder))
        yield process_group.gather(result)[0]


def _take_part(recipe: Recipe, folder: Path, checkpoint: Path | None, task: Task | None) -> None:
    """Do this process's share of a run that the first process writes."""
    resumed = checkpoint is not None
    with tempfile.TemporaryDirectory() as scratch:
        started = _start(recipe, folder, Path(scratch), quiet=True, resumed=resumed, task=task)
        _train(started, checkpoint, quiet=True)
        for part in ("validation", "test"):
            if part == "test" or started.task.validation is not None:
                started.measures(part)
        whole_weights(started.trainer)


def _run(
    recipe: Recipe,
    folder: Path,
    checkpoint: Path | None,
    quiet: bool,
    say: Callable[[str], object],
    task: Task | None,
) -> dict[str, Any]:
    """Begin the run, or go on with it, and return its result."""
    resumed = checkpoint is not None
    started = _start(recipe, folder, folder, quiet=quiet, resumed=resumed, say=say, task=task)
    if started.calibration is not None:
        started.calibration.save(folder / CALIBRATION_FILE)
    train_seconds = _train(started, checkpoint, quiet)
    task, method, model = started.task, started.method, started.trainer.model
    validation = None if task.validation is None else started.measures("validation")
    measures = started.measures("test")
    weights = whole_weights(started.trainer)
    if method.trains:
        with writing(folder / method.saved_as, RESUME_ADVICE):
            method.save(model, folder / method.saved_as, folder / INITIAL_ADAPTER, weights)
    result = {
        "score": measures.pop("score"),
        "score_name": task.score_name,
        "scored": task.episodes or len(task.test),
        "eval_loss": measures.pop("loss"),
        "measures": measures,
        "validation": validation,
        "trainable_parameters": count_trainable(model),
        "first_gradient_b": _first_gradient_b(folder),
        "init_seconds": started.init_seconds,
        "train_seconds": train_seconds,
        "resumed": resumed,
        "steps": recipe.training.steps,
        "peak_memory_bytes": peak_memory(),
        "versions": library_versions(),
        "data_fingerprint": data_fingerprint(task),
    }
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    # of a thousand runs they would fill the disk
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return result


def measure(recipe: Recipe, folder: Path, *, tested: bool) -> dict[str, Any]:
    """Train and evaluate, and return what the run measured; nothing of it is kept.

    Args:
        folder: an empty one to work in.
        tested: whether the test examples are evaluated. A run that is not tested is to choose
            settings by where it ends: evaluations on the way, up to half of a run's time, are left
            out.

    Returns:
        curve: [step, loss, score or None] per evaluation on the validation examples.
        validation, test: measures by name; test is None unless `tested`.
        diverged: the validation loss is no number, or larger at the end than at the start.
        parameters, init_seconds, train_seconds, peak_memory_bytes, versions, as `run` gives them.
        kappa, participation: of the start, see `start_facts`; None without an adapter.
        ranks: layer → rank, where the method has redistributed them.

    Raises:
        See `run`.
    """
    require_compatible(find_method(recipe.method), recipe)
    if not tested:
        recipe = replace(
            recipe, training=replace(recipe.training, eval_every=recipe.training.steps)
        )
    started = _start(recipe, folder, folder, quiet=True, checkpoints=False)
    facts = start_facts(started.trainer.model, started.task, recipe)
    train_seconds = _train(started, None, quiet=True)
    test = started.measures("test") if tested else None
    validation = started.measures("validation")
    lines = [line for line in read_metrics(folder) if "eval_loss" in line]
    curve = [[line["step"], line["eval_loss"], line.get("eval_score")] for line in lines]
    first, last = curve[0][1], curve[-1][1]
    return {
        "curve": curve,
        "validation": validation,
        "test": test,
        "diverged": not last <= first,  # also where one is no number
        "parameters": count_trainable(started.trainer.model),
        "init_seconds": started.init_seconds,
        "train_seconds": train_seconds,
        "peak_memory_bytes": peak_memory(),
        "kappa": facts.kappa,
        "participation": facts.participation,
        "ranks": facts.ranks,
        "versions": library_versions(),
    }


@dataclass(frozen=True)
class _Started:
    """A run that is set up, before its first step and after its last one.

    Attributes:
        folder: for what every process of a run writes; see `_start`.
        calibration: that the adapter starts from, where the method has one.
    """

    recipe: Recipe
    trainer: Any
    task: Task
    method: Method
    folder: Path
    calibration: Calibration | None
    init_seconds: float

    def measures(self, part: Part) -> dict[str, Any]:
        """Return a part's measures after the last step by their names, loss and score among them.

        What Trainer evaluated after the last step is not evaluated again.
        """
        evaluated = "test" if self.task.validation is None else "validation"
        history = [line for line in self.trainer.state.log_history if "eval_loss" in line]
        prefix = "eval" if part == evaluated else part
        if part == evaluated and history and history[-1]["step"] == self.trainer.args.max_steps:
            final = history[-1]
        else:
            final = self.trainer.evaluate(self.task.examples(part), metric_key_prefix=prefix)
        measures = {}
        for key, value in final.items():
            if key.startswith(f"{prefix}_") and not key.endswith(_ABOUT_SPEED):
                measures[key.removeprefix(f"{prefix}_")] = value
        if part == "test":
            for name, examples in self.task.more_tests.items():
                # not by its name alone, which may be "eval", as Trainer calls the validation
                more_prefix = f"more_{name}"
                more_measures = self.trainer.evaluate(examples, metric_key_prefix=more_prefix)
                measures[f"{name}_score"] = more_measures[f"{more_prefix}_score"]
        if self.task.evaluate is not None:
            measures |= self.task.evaluate(self.trainer.model.eval(), part, self.folder)
        return measures


def _start(
    recipe: Recipe,
    folder: Path,
    process_folder: Path,
    *,
    quiet: bool,
    resumed: bool = False,
    checkpoints: bool = True,
    say: Callable[[str], object] = _say_nothing,
    task: Task | None = None,
) -> _Started:
    """Do everything of a run up to its first step.

    Args:
        folder: of the run, for what its first process writes.
        process_folder: for what every process writes.
        checkpoints: whether Trainer writes any.
    """
    reset_peak_memory()
    transformers.set_seed(recipe.seed)
    method = find_method(recipe.method)
    task = task or find_domain(recipe.domain).prepare(recipe)
    keep_trainable(task.model)
    if task.about:
        say(task.about)

    start = time.perf_counter()
    model = method.adapt(task.model, adapter_setup(recipe, task.models, task.head))
    trainer = build_trainer(
        recipe, task, method, model, folder, resumed=resumed, checkpoints=checkpoints
    )
    calibration = _initialize(trainer, recipe, task, method, process_folder, quiet)
    init_seconds = time.perf_counter() - start
    return _Started(recipe, trainer, task, method, process_folder, calibration, init_seconds)


def _train(started: _Started, checkpoint: Path | None, quiet: bool) -> float:
    """Train from the start or the checkpoint on, up to the last step, and return the seconds."""
    recipe, trainer = started.recipe, started.trainer
    transformers.set_seed(recipe.seed)  # whatever a method drew, all see the same batches
    start = time.perf_counter()
    if started.method.trains:
        with training_shown(trainer, quiet):
            _train_from(trainer, checkpoint, recipe.training.steps)
    return time.perf_counter() - start


def adapter_setup(recipe: Recipe, models: ModelKind, head: list[str]) -> AdapterSetup:
    """Return the settings of a recipe's adapter for a model of this kind."""
    return AdapterSetup(
        adapter=recipe.adapter,
        task_type=models.task_type,
        head=head,
        new_head=models.new_head,
        steps=recipe.training.steps,
    )


def _initialize(
    trainer: Any, recipe: Recipe, task: Task, method: Method, folder: Path, quiet: bool
) -> Calibration | None:
    """Start the adapter from data or weights, and return the calibration, where there is one."""
    progress: ProgressOption = None if quiet else "auto"

    def initialize_here(**options: Unpack[EvaOptions]) -> Calibration:
        return initialize(trainer, rows=task.rows, progress=progress, **options)

    def initialize_elsewhere(**options: Unpack[EvaOptions]) -> Calibration:
        other_recipe, other = another_task(recipe)
        other_trainer = build_trainer(other_recipe, other, method, trainer.model, folder)
        return initialize(other_trainer, rows=other.rows, progress=progress, **options)

    preparation = Preparation(
        initialize=initialize_here,
        initialize_elsewhere=initialize_elsewhere,
        batches=lambda size: training_batches(trainer, size, recipe.seed),
        seed=recipe.seed,
        initial_adapter=folder / INITIAL_ADAPTER,
        options={
            "rho": recipe.adapter.rho,
            "budget": recipe.adapter.budget,
            "scale": recipe.adapter.scale,
        },
        rows=task.rows,
        progress=progress,
    )
    return method.prepare(trainer.model, preparation)


def _train_from(trainer: Any, checkpoint: Path | None, steps: int) -> None:
    """Train from the checkpoint on; one of the last step is loaded and not trained further."""
    if checkpoint is None:
        trainer.train()
    elif checkpoint.name == f"checkpoint-{steps}":  # killed after the last step
        trainer._load_from_checkpoint(str(checkpoint))
        state_path = str(checkpoint / "trainer_state.json")
        trainer.state = transformers.TrainerState.load_from_json(state_path)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))


def _first_gradient_b(folder: Path) -> float | None:
    """Return the norm of the gradient of all B at the first step; None without an adapter."""
    for line in read_metrics(folder):
        if "grad_norm_B" in line:
            return float(line["grad_norm_B"])
    return None


def library_versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
