"""`evatune.initialize(trainer)` for transformers' and TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from evatune.adapters.peft import initialize_model
from evatune.calibrate import ForwardFunction, call_model
from evatune.calibration import Calibration
from evatune.errors import AdapterError
from evatune.trainers.summary import summary


def initialize_trainer(
    trainer: Any, calibration: Calibration | None = None, *, forward: ForwardFunction | None, **options: Any
) -> Calibration:
    """Initialise `trainer.model` on the trainer's own training batches, collator, device and precision.

    Several processes all see the same batches, and so find the same directions and ranks; the work is not shared out.
    With a finished `calibration` no batch is run.
    """
    if getattr(trainer, "optimizer", None) is not None:
        raise AdapterError(
            "the trainer already has an optimiser, which holds the adapter's old parameters; call "
            "evatune.initialize(trainer) right after Trainer(...), before trainer.train(), and pass no optimizers="
        )

    if calibration is not None:
        return initialize_model(trainer.model, calibration, forward=forward, **options)

    def prepared(model: nn.Module, batch: Any) -> Any:
        with trainer.accelerator.autocast():  # the precision that training will run in
            return (forward or call_model)(model, batch)

    if trainer.accelerator.num_processes > 1:
        same = training_batches(trainer, trainer.args.per_device_train_batch_size, trainer.args.seed)
        return initialize_model(trainer.model, same, forward=prepared, **options)
    inner = _loader(trainer)

    def batches() -> Iterator[Any]:  # the loader draws its seed when this is first asked, where random states are kept
        for batch in inner:
            yield trainer._prepare_inputs(batch)

    return initialize_model(trainer.model, batches(), forward=prepared, **options)


def log_at_start(trainer: Any, calibration: Calibration) -> None:
    """Have the trainer log the calibration's summary when it begins to train, as it logs its losses."""
    trainer.remove_callback(_LogAtStart)  # of an earlier call, which this one has replaced
    trainer.add_callback(_LogAtStart(trainer, summary(calibration)))


class _LogAtStart(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Not at once: before training, trackers have no run to log to, and training begins with an empty log."""

    def __init__(self, trainer: Any, figures: dict[str, float]) -> None:
        self.trainer, self.figures = trainer, figures

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.log(dict(self.figures))


def training_batches(trainer: Any, size: int, seed: int) -> Iterator[Any]:
    """One pass over the trainer's training examples, `size` at a time, in an order that the seed alone decides.

    Collator, columns and device are the trainer's.
    """
    inner = _loader(trainer)
    order = torch.Generator().manual_seed(seed)
    for batch in DataLoader(inner.dataset, size, shuffle=True, generator=order, collate_fn=inner.collate_fn):
        yield trainer._prepare_inputs(batch)


def _loader(trainer: Any) -> Any:
    """The trainer's loader of training batches, without a trace of it in the trainer."""
    known = len(trainer.accelerator._dataloaders)
    loader = trainer.get_train_dataloader()
    del trainer.accelerator._dataloaders[known:]  # accelerate saves the state of all it has prepared
    # The loader inside accelerate's own: leaving that one early would leave its end-of-epoch mark behind.
    return getattr(loader, "base_dataloader", loader)
