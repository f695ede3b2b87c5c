"""One fine-tuning run: a recipe in, a folder of results out. transformers' Trainer does the
training."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

from evatune.api import initialize
from evatune.distributed.group import require_alone
from evatune.errors import ConfigError
from evatune.finetune.methods import (
    AdapterSetup,
    Method,
    OptimizerOptions,
    Preparation,
    find_method,
)
from evatune.finetune.recipe import Recipe, as_tree, parse
from evatune.finetune.resuming import newest_whole
from evatune.finetune.tasks import generation, images, rl, understanding
from evatune.schemas import Damage, telling
from evatune.schemas.run import MetricsLine, Result
from evatune.schemas.text import parse_json, read_text, validate_json
from evatune.trainers.hf import training_batches
from evatune.utils.atomic import write_text, writing
from evatune.utils.lock import held
from evatune.utils.names import resolved

DOMAINS: dict[str, ModuleType] = {
    "generation": generation,
    "understanding": understanding,
    "images": images,
    "rl": rl,
}


# what its evaluation says about speed
_OF_TRAINER = ("runtime", "per_second", "model_preparation_time")


# need no more settings
_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


RESULT, METRICS, RECIPE = "result.json", "metrics.jsonl", "recipe.json"


_ROOM = "make room, then run the same command again to go on"


_CALIBRATION, _START, _CHECKPOINTS = "calibration.safetensors", "start", "checkpoints"


def run(recipe: Recipe, folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train and evaluate; a folder with a finished run of the same recipe is read instead, an
    unfinished one resumed.

    Writes `recipe.json`, `metrics.jsonl`, `adapter/` (or `model/`), `calibration.safetensors` where
    the method has one, Trainer's checkpoints while it runs, and last of all `result.json`.

    Returns:
        What `result.json` holds: score in [0, 1] (higher is better), eval_loss, measures (what else
            the task measures),
        trainable_parameters, first_gradient_b (norm of the gradient of all B at step 1, None
        without an adapter), init_seconds, train_seconds, steps.

    Raises:
        ConfigError: an unknown domain, task or method; a folder that holds another run, or in which
            another process works. DataError: data cannot be had.
    """
    if recipe.domain not in DOMAINS:
        raise ConfigError(f"domain is {recipe.domain!r}; choose one of {', '.join(DOMAINS)}")
    find_method(recipe.method)
    require_alone("evatune train")
    folder = resolved(folder)  # what is judged here and what is written later are the same place
    result = _finished(recipe, folder)
    if result is not None:
        return result
    with held(folder):
        result = _finished(recipe, folder)  # by whoever held the folder until now
        if result is not None:
            return result
        with _claimed(recipe, folder):
            return _train(recipe, folder, quiet)


def _finished(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Return what the recipe's run has written; None where it is not finished."""
    _require_ours(folder, as_tree(recipe))
    return read_result(folder)


def _train(recipe: Recipe, folder: Path, quiet: bool) -> dict[str, Any]:
    """Begin the run, or go on with it, and return its result."""
    transformers.set_seed(recipe.seed)
    training = recipe.training
    task = DOMAINS[recipe.domain].prepare(recipe)
    whole = newest_whole(folder / _CHECKPOINTS)
    checkpoint = None if whole is None else str(whole)
    start = time.perf_counter()
    method = find_method(recipe.method)
    setup = AdapterSetup(
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        targets=recipe.adapter.targets,
        task_type=task.task_type,
        head=task.head,
        new_head=task.new_head,
        steps=training.steps,
    )
    model = method.adapt(task.model, setup)
    optimizer_options = OptimizerOptions(
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lora_plus_ratio=training.lora_plus_ratio,
    )
    arguments = _arguments(recipe, folder, resumed=checkpoint is not None, quiet=quiet)
    trainer = _trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=task.test,
        data_collator=task.collator,
        compute_metrics=task.metric,
        preprocess_logits_for_metrics=task.reduce,
        optimizers=(method.optimizer(model, optimizer_options), None),
        callbacks=[
            _AfterStep(method),
            _Metrics(folder / METRICS, training.batch_size * training.accumulate),
        ],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)  # metrics go to the file
    preparation = Preparation(
        initialize=lambda **options: initialize(trainer, rows=task.rows, **options),
        batches=lambda size: training_batches(trainer, size, recipe.seed),
        rho=recipe.adapter.rho,
        budget=recipe.adapter.budget,
        seed=recipe.seed,
        initial_adapter=folder / _START,
        rows=task.rows,
    )
    calibration = method.prepare(model, preparation)
    init_seconds = time.perf_counter() - start
    if calibration is not None:
        calibration.save(folder / _CALIBRATION)
    transformers.set_seed(recipe.seed)  # whatever a method drew, all see the same batches
    start = time.perf_counter()
    # killed after the last step
    if checkpoint is not None and checkpoint.endswith(f"-{training.steps}"):
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = transformers.TrainerState.load_from_json(
            str(Path(checkpoint) / "trainer_state.json")
        )
    elif method.trains:
        trainer.train(resume_from_checkpoint=checkpoint)
    train_seconds = time.perf_counter() - start
    final = next(
        (line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {"step": -1}
    )
    if final["step"] != training.steps:
        final = trainer.evaluate()
    measures = {
        key.removeprefix("eval_"): value for key, value in final.items() if key.startswith("eval_")
    }
    if task.evaluate is not None:
        measures |= task.evaluate(model.eval(), folder)
    if method.trains:
        with writing(folder / method.saved_as, _ROOM):
            method.save(model, folder / method.saved_as, folder / _START)
    result = {
        "score": measures.pop("score"),
        "eval_loss": measures.pop("loss"),
        "measures": {
            key: value for key, value in measures.items() if not key.endswith(_OF_TRAINER)
        },
        "trainable_parameters": _trainable(model),
        "first_gradient_b": next(
            (line["grad_norm_B"] for line in read_metrics(folder) if "grad_norm_B" in line), None
        ),
        "init_seconds": init_seconds,
        "train_seconds": train_seconds,  # of the last stretch, if the run was resumed
        "resumed": checkpoint is not None,
        "steps": training.steps,
        "peak_memory_bytes": _peak_memory(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    # of a thousand runs they would fill the disk
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run has written, or None for one that is not finished.

    Raises RecordError for a damaged one.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    with telling(path, "remove it, and the run is done again"):
        return validate_json(Result, read_text(path)).model_dump()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, in the order of their steps.

    A damaged line is left out with a warning, but for the last one: of a killed run that may be
    half a line.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    with telling(path, "remove it; the result of the run stands without"):
        texts = read_text(path, errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(validate_json(MetricsLine, text).model_dump())
        except Damage as damage:
            if number < len(texts):
                place = f"line {number} of {str(path)!r}"
                warnings.warn(f"{place} is left out: it {damage}", stacklevel=2)
    return lines


class _Metrics(transformers.TrainerCallback):  # type: ignore[misc]
    """Appends one JSON object per log or evaluation."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path = path
        self.batch_size = batch_size
        self.norms: dict[str, float] = {}
        self.begun = self.begun_at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed run repeats the steps after its checkpoint; without one it begins anew.
        before = read_metrics(self.path.parent) if state.global_step else []
        kept = [line for line in before if line["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.begun, self.begun_at = time.perf_counter(), state.global_step

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        if state.global_step == 0 or (state.global_step + 1) % args.logging_steps == 0:
            self.norms = _gradient_norms(model)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], model: nn.Module, **_: Any
    ) -> None:
        # summaries, of what result.json and the calibration hold
        if "train_runtime" in logs or "evatune/batches" in logs:
            return
        seconds = time.perf_counter() - self.begun
        samples = (state.global_step - self.begun_at) * self.batch_size
        line = {
            "step": state.global_step,
            "seconds": seconds,
            "samples_per_second": samples / seconds if seconds else 0.0,
        }
        line |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if "loss" in logs:
            # They were taken after Trainer's clipping, whose factor its own norm tells.
            clipped = (
                max(1.0, logs.get("grad_norm", 0.0) / args.max_grad_norm)
                if args.max_grad_norm
                else 1.0
            )
            line |= {key: value * clipped for key, value in self.norms.items()}
            line |= {"peak_memory_bytes": _peak_memory(), "trainable_parameters": _trainable(model)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class _Trainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer, whose checkpoints fail in one sentence."""

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        with writing(self.args.output_dir, _ROOM):
            super()._save_checkpoint(*arguments, **options)


class _AfterStep(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, method: Method) -> None:
        self.method = method

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        self.method.after_step(model, state.global_step)


def _require_ours(folder: Path, tree: dict[str, Any]) -> None:
    """Raise a ConfigError unless the folder holds this recipe's run, or is free."""
    path = folder / RECIPE
    if path.is_file():
        with telling(path, "its run cannot go on; name another --out", ConfigError):
            fields = parse_json(read_text(path))
            if not isinstance(fields, dict):
                raise Damage("is damaged: it does not hold keys with values")
        before = as_tree(parse(fields, f"{str(path)!r}, whose run cannot go on,"))
        changed = sorted(key for key in {*before, *tree} if before.get(key) != tree.get(key))
        if changed:
            raise ConfigError(
                f"{str(folder)!r} holds a run with other settings (they differ in"
                f" {', '.join(changed)}); name another --out"
            )
    elif folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise ConfigError(f"{str(folder)!r} exists and holds no run of evatune; name another --out")


@contextmanager
def _claimed(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Mark the folder as this run's; a run that ends before it trains leaves nothing in it.

    Not until then has everything been looked at that a recipe can get wrong, down to a rank budget
    that the layers cannot take up.
    """
    try:
        if not (folder / RECIPE).exists():
            write_text(folder / RECIPE, json.dumps(as_tree(recipe), indent=2) + "\n")
        yield
    except BaseException:
        if not (folder / METRICS).exists():
            for name in (_CALIBRATION, _START, _CHECKPOINTS, RECIPE):
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _arguments(recipe: Recipe, folder: Path, *, resumed: bool, quiet: bool) -> Any:
    training = recipe.training
    if training.schedule not in _SCHEDULES:
        raise ConfigError(
            f"training.schedule is {training.schedule!r}; choose one of {', '.join(_SCHEDULES)}"
        )
    return transformers.TrainingArguments(
        output_dir=str(folder / _CHECKPOINTS),
        seed=recipe.seed,
        learning_rate=training.learning_rate,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=4 * training.batch_size,
        gradient_accumulation_steps=training.accumulate,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        warmup_steps=round(training.warmup * training.steps),
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        logging_steps=training.log_every,
        logging_first_step=True,
        eval_strategy="steps",
        eval_on_start=not resumed,
        eval_steps=training.eval_every,
        save_strategy="steps" if find_method(recipe.method).resumable else "no",
        save_steps=training.save_every,
        save_total_limit=1,
        report_to=training.report_to,
        disable_tqdm=quiet or not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _trainer(**options: Any) -> Any:
    try:
        return _Trainer(**options)
    # such as a tracker that is not installed
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"Trainer refuses these settings: {' '.join(str(error).split())}"
        ) from error


def _gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of the gradient of all A and of all B; nothing where there are none."""
    norms: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
    for path, parameter in model.named_parameters():
        for matrix, found in norms.items():
            if f"lora_{matrix}" in path and parameter.grad is not None:
                found.append(parameter.grad.float().norm())
    return {
        f"grad_norm_{matrix}": float(torch.stack(found).norm())
        for matrix, found in norms.items()
        if found
    }


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _peak_memory() -> int:
    """Bytes: of the accelerator's memory where there is one, else of this process since it
    began."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
