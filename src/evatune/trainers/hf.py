"""`evatune.initialize(trainer)` for transformers' and TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from evatune.adapters.peft import initialize_model
from evatune.calibrate import ForwardFunction, call_model
from evatune.calibration import Calibration
from evatune.errors import AdapterError


def initialize_trainer(trainer: Any, *, forward: ForwardFunction | None, **options: Any) -> Calibration:
    """Initialise `trainer.model` on the trainer's own training batches, collator, device and precision."""
    if getattr(trainer, "optimizer", None) is not None:
        raise AdapterError(
            "the trainer already has an optimiser, which holds the adapter's old parameters; call "
            "evatune.initialize(trainer) right after Trainer(...), before trainer.train(), and pass no optimizers="
        )

    def prepared(model: nn.Module, batch: Any) -> Any:
        with trainer.accelerator.autocast():  # the precision that training will run in
            return (forward or call_model)(model, batch)

    known = len(trainer.accelerator._dataloaders)
    loader = trainer.get_train_dataloader()
    del trainer.accelerator._dataloaders[known:]  # accelerate saves the state of all it has prepared
    # The loader inside accelerate's own: leaving that one early would leave its end-of-epoch mark behind.
    inner = getattr(loader, "base_dataloader", loader)

    def batches() -> Iterator[Any]:  # the loader draws its seed when this is first asked, where random states are kept
        for batch in inner:
            yield trainer._prepare_inputs(batch)

    return initialize_model(trainer.model, batches(), forward=prepared, **options)
