"""`EvaCallback`: the same initialization inside Lightning's `Trainer.fit`.

Needs `pip install 'evatune[lightning]'`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from evatune.adapters.adapter import lora_config
from evatune.adapters.initialize import resolve_scale
from evatune.api import initialize
from evatune.calibration.result import Calibration
from evatune.errors import AdapterError, DataError
from evatune.modeling.batches import iterate
from evatune.modeling.forward import ForwardFunction, call_model
from evatune.modeling.wrappers import adapted, adapted_inside
from evatune.trainers.summary import summary
from evatune.utils.extras import extras

with extras(__name__):
    try:
        import lightning.pytorch as pl
        from lightning.pytorch.utilities import CombinedLoader
    except ModuleNotFoundError:  # the same code, under the name that it had before version 2
        import pytorch_lightning as pl
        from pytorch_lightning.utilities import CombinedLoader


class EvaCallback(pl.Callback):  # type: ignore[misc]  # not a type: its library is not followed
    """Start the LoRA adapter of a LightningModule with EVA: `Trainer(callbacks=[EvaCallback()])`.

    It runs in `setup` of a fit: after the datamodule's `setup`, before the module's own `setup` and
    before optimizers are built, which must hold the new parameters. The module must have its
    adapter by then, so build it in `__init__`: a `PeftModel`, or a transformers model after
    `add_adapter`, as the module's attribute or anywhere inside it.

    A later fit of the same module leaves it as it is. With `ckpt_path=` the ranks must come out as
    they did for the checkpoint: seed the run alike, or give the `Calibration` of the first run,
    which `calibration` holds and `save` keeps.

    Args:
        batches: what `evatune.initialize` takes, a `Calibration` too. Default: the batches of the
            fit, by one pass over the datamodule's, the module's or the given `train_dataloader`, as
            the module's transfer hooks leave them.
        forward: `forward(model, batch)` runs the model that carries the adapter. Default: the rule
            of `evatune.calibrate`, which for a batch `(x, y)` means `model(x, y)`; if the training
            step calls `self.model(x)`, give `forward=lambda model, batch: model(batch[0])`. Either
            runs in the trainer's precision (autocast).
        options: any other of `evatune.initialize`; a `loss` runs in that precision too.

    Attributes:
        calibration: the `Calibration`, after `setup`. Its summary goes to the trainer's loggers at
            step 0; see `evatune.trainers.summary`.

    Raises, in `setup`:
        AdapterError: no adapter in the module, or several models with one.
        DataError: several processes and batches; with a `Calibration` any number may start alike.
        All else as for `evatune.initialize`, which see for cost.
    """

    def __init__(
        self,
        batches: Iterable[Any] | Calibration | None = None,
        *,
        forward: ForwardFunction | None = None,
        **options: Any,
    ) -> None:
        self.batches, self.forward, self.options = batches, forward, options
        self.calibration: Calibration | None = None
        self._module: Any = None  # the one that is initialized

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called by Lightning at the beginning of `fit`, `validate`, `test` and `predict`."""
        if stage != "fit" or pl_module is self._module:
            return
        if not adapted_inside(pl_module):
            raise AdapterError(
                f"{type(pl_module).__name__} holds no model with an adapter when setup begins;"
                " build one in its __init__: self.model = get_peft_model(model, LoraConfig(r=16,"
                " target_modules='all-linear'))"
            )
        model = adapted(pl_module)
        lora = lora_config(model, self.options.get("adapter_name", "default"))
        scale = resolve_scale(lora, self.options.get("scale"))
        if isinstance(self.batches, Calibration):
            self.calibration = initialize(model, self.batches, forward=self.forward, **self.options)
        else:
            self.calibration = self._calibrated(trainer, model, self.batches)
        self._module = pl_module
        figures = summary(self.calibration, scale)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=0)

    def _calibrated(
        self, trainer: Any, model: nn.Module, batches: Iterable[Any] | None
    ) -> Calibration:
        if trainer.world_size > 1:
            raise DataError(
                f"EvaCallback reads batches on one process, and this run has {trainer.world_size},"
                " which must all start alike; calibrate first and give them one result:"
                " EvaCallback(evatune.Calibration.load(path))"
            )
        source = _training_batches(trainer) if batches is None else batches

        def in_precision(function: ForwardFunction) -> ForwardFunction:
            def call(model: nn.Module, batch: Any) -> Any:
                with trainer.precision_plugin.forward_context():
                    return function(model, batch)

            return call

        def moved() -> Iterator[Any]:
            for batch in iterate(source):
                yield trainer.strategy.batch_to_device(batch)

        trainer.strategy.model_to_device()  # as Lightning does soon after
        functions = {"forward": in_precision(self.forward or call_model)}
        if self.options.get("loss") is not None:
            functions["loss"] = in_precision(self.options["loss"])
        return initialize(model, moved(), **(self.options | functions))


def _training_batches(trainer: Any) -> Iterator[Any]:
    """Yield the training batches; asked for when the first is wanted.

    That is where random states are kept.
    """
    try:
        loaders = trainer.fit_loop._data_source.dataloader()
    except Exception as error:
        error.add_note(
            "evatune's EvaCallback asked for train_dataloader() before the LightningModule's own"
            " setup(). If that is what makes the data, give EvaCallback(batches=...) a loader of"
            " its own, or make the data in a LightningDataModule."
        )
        raise
    # as a fit does, for one loader or several
    for batch, _, _ in CombinedLoader(loaders, "max_size_cycle"):
        yield batch
