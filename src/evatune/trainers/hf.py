"""`evatune.initialize(trainer)` for transformers' and TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from transformers import TrainerCallback

from evatune.adapters.adapter import lora_config
from evatune.adapters.initialize import initialize_model, resolve_scale
from evatune.adapters.options import InitializeOptions
from evatune.calibration.result import Calibration
from evatune.distributed.group import ProcessGroup
from evatune.errors import AdapterError, DataError
from evatune.modeling.forward import ForwardFunction, call_model, model_device, to_device
from evatune.modeling.wrappers import adapted, unwrapped
from evatune.trainers.summary import summary
from evatune.trainers.trl import generates, is_prompts, model_inputs, prompt_inputs


def initialize_trainer(
    trainer: Any,
    calibration: Calibration | None,
    options: InitializeOptions,
    process_group: ProcessGroup,
) -> Calibration:
    """Initialize `trainer.model` on its own training batches, collator, device and precision.

    Several processes share the batches out. With a finished `calibration` no batch is run. The
    trainer logs a summary when it begins to train.
    """
    _require_untouched(trainer)
    model = adapted(unwrapped(trainer.model))
    scale = resolve_scale(lora_config(model, options.adapter_name), options.scale)
    batches: Iterable[Any] | Calibration
    if calibration is not None:
        batches = calibration
    else:
        options = _in_training_precision(trainer, options)
        needs_loss = options.config is not None and options.config.needs_loss
        batches = _own_batches(trainer, process_group, labels=not needs_loss)
    calibration = initialize_model(trainer.model, batches, options, process_group)
    _log_at_start(trainer, summary(calibration, scale, trainer.args.learning_rate))
    return calibration


def _require_untouched(trainer: Any) -> None:
    """Raise an AdapterError for a trainer that would not train the parameters written here."""
    if getattr(trainer, "model_init", None) is not None:
        raise AdapterError(
            "this trainer has a model_init, by which train() builds its model anew and throws the"
            " start away; call evatune.initialize(model, batches) inside model_init, or"
            " evatune.initialize(model, calibration) with one calibration for all trials"
        )
    if getattr(trainer, "optimizer", None) is not None:
        raise AdapterError(
            "the trainer already has an optimizer, which was built for the adapter as it was; call"
            " evatune.initialize(trainer) right after Trainer(...), before trainer.train(), and"
            " pass no optimizers="
        )


def _in_training_precision(trainer: Any, options: InitializeOptions) -> InitializeOptions:
    """Return options whose forward pass runs on the model's device, in the trainer's precision."""

    def in_precision(function: ForwardFunction) -> ForwardFunction:
        def call(model: nn.Module, batch: Any) -> Any:
            # of models to be sharded, not the trainer's yet
            batch = to_device(batch, model_device(model))
            with trainer.accelerator.autocast():  # the precision that training will run in
                return function(model, batch)

        return call

    forward, loss = options.run.forward or call_model, options.run.loss
    run = replace(
        options.run,
        forward=in_precision(forward),
        loss=None if loss is None else in_precision(loss),
    )
    return replace(options, run=run)


def _own_batches(trainer: Any, process_group: ProcessGroup, *, labels: bool) -> Iterable[Any]:
    """Return the trainer's batches; of several processes, this one's share of them.

    Args:
        labels: whether completions get labels where TRL marks them in another way: those of a
            language model, which are not what a trainer on preferences minimizes.
    """
    if trainer.accelerator.num_processes == 1 and not generates(trainer):
        return _Prepared(trainer, _loader(trainer), labels)
    size, seed = trainer.args.per_device_train_batch_size, trainer.args.seed
    return training_batches(
        trainer, size, seed, process_group.rank, process_group.size, labels=labels
    )


def _log_at_start(trainer: Any, figures: dict[str, float]) -> None:
    """Have the trainer log the calibration's summary when it begins to train.

    It fails then if its model is another one by that time.
    """
    trainer.remove_callback(_LogAtStart)  # of an earlier call, which this one has replaced
    trainer.add_callback(_LogAtStart(trainer, figures))


class _LogAtStart(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Logs when training begins.

    Before it, trackers have no run to log to, and training begins with an empty log.
    """

    def __init__(self, trainer: Any, figures: dict[str, float]) -> None:
        self.trainer, self.figures = trainer, figures
        self.started = adapted(unwrapped(trainer.model))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if not any(module is self.started for module in self.trainer.model.modules()):
            raise AdapterError(
                "the trainer's model is not the one that evatune.initialize(trainer) started; build"
                " the trainer anew, and call evatune.initialize after whatever replaces"
                " trainer.model"
            )
        self.trainer.log(dict(self.figures))


def training_batches(
    trainer: Any,
    size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
    *,
    labels: bool = False,
) -> Iterator[Any]:
    """Yield one pass over the trainer's training examples, `size` at a time.

    The seed alone decides on their order. Of several processes each gets every so many-th batch.
    Collator, columns and device are the trainer's.
    """
    inner = _loader(trainer)
    data = inner.dataset
    loader: Iterable[Any]
    if isinstance(data, IterableDataset):  # comes in its own order, and all of it must be read
        loader = DataLoader(data, size, collate_fn=inner.collate_fn)
        # else accelerate has cut it into shards already
        if trainer.accelerator.dispatch_batches is not False:
            loader = islice(loader, process, None, processes)
    else:
        size = max(1, min(size, len(data) // processes))  # of few examples, a batch for each
        order = RandomSampler(data, generator=torch.Generator("cpu").manual_seed(seed))
        share = islice(BatchSampler(order, size, drop_last=False), process, None, processes)
        loader = (inner.collate_fn([data[index] for index in indices]) for indices in share)
    yield from _Prepared(trainer, loader, labels)


class _Prepared:
    """Batches on the trainer's own device.

    A loader draws its seed when this is first asked, which is where random states are kept.
    """

    def __init__(self, trainer: Any, loader: Iterable[Any], labels: bool = False) -> None:
        self._trainer, self._loader, self._labels = trainer, loader, labels

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        has_features = hasattr(trainer, "collect_features")
        for batch in self._loader:
            if is_prompts(batch):
                yield prompt_inputs(trainer, batch)
                continue
            inputs = model_inputs(trainer._prepare_inputs(batch), labels=self._labels)
            yield from _features(trainer, inputs) if has_features else [inputs]

    def __length_hint__(self) -> int:
        """Return how many batches of the loader there are; 0 where it does not say so."""
        return length_hint(self._loader)


def _features(trainer: Any, inputs: Any) -> list[Any]:
    """Return the inputs in a batch of a sentence-transformers trainer: anchors, positives, …"""
    features: list[Any] = trainer.collect_features(inputs)[0]
    if not all(isinstance(feature, Mapping) for feature in features):
        raise DataError(
            f"the batches of {type(trainer).__name__} are texts, which its loss makes tokens of;"
            " give tokens before trainer.train(): evatune.initialize(model,"
            " [model.preprocess(pairs), …])"
        )
    return features


def _loader(trainer: Any) -> Any:
    """Return a new loader of the trainer's training batches, which the trainer does not keep."""
    n_before = len(trainer.accelerator._dataloaders)
    loader = trainer.get_train_dataloader()
    # accelerate saves the state of all it has prepared
    del trainer.accelerator._dataloaders[n_before:]
    # The loader inside accelerate's own: leaving that one early would leave its end-of-epoch mark
    # behind.
    return getattr(loader, "base_dataloader", loader)
