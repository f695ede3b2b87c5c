"""transformers' Trainer for a run of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from evatune.errors import ConfigError
from evatune.finetune.methods import Method
from evatune.finetune.metrics import METRICS, MetricsCallback
from evatune.finetune.recipe import COSINE_WITH_MIN_LR, Recipe
from evatune.finetune.run_folder import CHECKPOINTS, RESUME_ADVICE
from evatune.finetune.sharding import sharding_arguments
from evatune.finetune.tasks import Task
from evatune.utils.atomic import writing
from evatune.utils.launcher import is_main_process, processes
from evatune.utils.progress import Display, display
from evatune.utils.text import duration, one_line

# Logged by Trainer → as it is shown.
_SHOWN = {"loss": "training loss", "eval_score": "validation score"}


def build_trainer(
    recipe: Recipe,
    task: Task,
    method: Method,
    model: Any,
    folder: Path,
    *,
    resumed: bool = False,
    checkpoints: bool = True,
) -> Any:
    """Return the Trainer of a run, which writes metrics and checkpoints into the folder.

    It evaluates the validation examples, where there are some, else the test examples.

    Raises ConfigError for settings that Trainer refuses.
    """
    training = recipe.training
    if training.gradient_checkpointing:
        _enable_checkpointing(model, recipe.model)
    batch_size = training.batch_size * training.accumulate
    callbacks: list[Any] = [_AfterStep(method)]
    if is_main_process():
        callbacks.append(MetricsCallback(folder / METRICS, batch_size))
    saves = checkpoints and method.resumable
    arguments = _arguments(recipe, model, folder, resumed=resumed, saves=saves)
    try:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=task.train,
            eval_dataset=task.test if task.validation is None else task.validation,
            data_collator=task.collator,
            compute_metrics=task.metric,
            preprocess_logits_for_metrics=task.reduce,
            optimizers=(method.optimizer(model, training), None),
            callbacks=callbacks,
        )
    # such as a tracker that is not installed
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"Trainer refuses these settings: {one_line(error, most=2000)}"
        ) from error
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)  # metrics go to the file
    # Trainer takes every model that has keyword arguments for one that divides its loss by a count
    # of tokens that it is given; classifiers, such as Bert's, take the mean over their own batch,
    # which Trainer would multiply by the number of processes, and not divide by the accumulated.
    trainer.model_accepts_loss_kwargs &= task.models.task_type == "CAUSAL_LM"
    return trainer


def _enable_checkpointing(model: Any, source: str) -> None:
    """Have activations computed again in training; ConfigError for a model that has no way to."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since 5.23
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"training.gradient_checkpointing is true, and the model {source!r} cannot"
            f" ({error}); leave it out"
        ) from error


def _arguments(
    recipe: Recipe, model: Any, folder: Path, *, resumed: bool, saves: bool
) -> transformers.TrainingArguments:
    training = recipe.training
    floor = {"min_lr_rate": training.floor} if training.schedule == COSINE_WITH_MIN_LR else None
    share, rest = divmod(training.batch_size, processes())
    if rest:
        raise ConfigError(
            f"training.batch_size is {training.batch_size}, which {processes()} processes cannot"
            f" share; give a multiple of {processes()}"
        )
    return transformers.TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        seed=recipe.seed,
        learning_rate=training.learning_rate,
        max_steps=training.steps,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=max(1, recipe.evaluation_batch // processes()),
        gradient_accumulation_steps=training.accumulate,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        **sharding_arguments(training.sharding, model),
        use_cpu=not torch.accelerator.is_available(),
        warmup_steps=round(training.warmup * training.steps),
        lr_scheduler_type=training.schedule,
        lr_scheduler_kwargs=floor,
        max_grad_norm=training.max_grad_norm,
        weight_decay=training.weight_decay,
        logging_steps=training.log_every,
        logging_first_step=True,
        eval_strategy="steps",
        eval_on_start=not resumed,
        eval_steps=training.eval_every,
        save_strategy="steps" if saves else "no",
        save_steps=training.save_every,
        save_total_limit=1,
        report_to=training.report_to,
        disable_tqdm=True,  # `training_shown` has a bar
        dataloader_pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def training_shown(trainer: Any, quiet: bool) -> Iterator[None]:
    """Show how far the block's training is, unless `quiet`."""
    with display("training", "steps", shown=not quiet) as shown:
        callback = _Shown(shown)
        trainer.add_callback(callback)
        try:
            yield
        finally:
            trainer.remove_callback(callback)
        steps = trainer.state.global_step
        shown.end(f"trained for {steps} steps in {duration(shown.seconds)}{callback.note}")


class _Shown(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells a display of the steps, and of the newest loss and score."""

    def __init__(self, shown: Display) -> None:
        self._display = shown
        self._newest: dict[str, float] = {}

    @property
    def note(self) -> str:
        """The newest figures, with a comma before each."""
        return "".join(f", {name} {value:.3g}" for name, value in self._newest.items())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        expected = self._display.forecast(state.global_step, state.max_steps)
        if expected is not None:
            self._display.say(f"{state.max_steps} steps, about {duration(expected)}")
        self._display.update(state.global_step, state.max_steps, self.note.removeprefix(", "))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        for key, name in _SHOWN.items():
            if key in logs:
                self._newest[name] = logs[key]


class _Trainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer, whose checkpoints fail in one sentence."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: nobody reads the number, and it goes through all weights at every step."""
        return 0

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        with writing(self.args.output_dir, RESUME_ADVICE):
            super()._save_checkpoint(*arguments, **options)


class _AfterStep(transformers.TrainerCallback):  # type: ignore[misc]
    """Calls the method's hook between an optimizer step and the clearing of gradients."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        self.method.after_step(model, state.global_step)
