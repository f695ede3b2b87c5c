"""The loop: run batches through the model, sketch what layers see, stop when it has settled."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from evatune.calibration.batches import BatchSource, Step
from evatune.calibration.build import build_calibration
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.loss_observer import LossObserver
from evatune.calibration.observer import BatchObserver, Observer
from evatune.calibration.options import RunOptions
from evatune.calibration.progress import Progress
from evatune.calibration.result import Calibration
from evatune.calibration.state import CalibrationState
from evatune.calibration.status import Status
from evatune.capture import TargetLayer
from evatune.distributed.group import ProcessGroup
from evatune.errors import ConfigError
from evatune.modeling.batches import require_arguments
from evatune.modeling.forward import model_device
from evatune.modeling.sharding import is_sharded, require_weights
from evatune.modeling.state import full_precision, preserve_model_state
from evatune.sketch import is_additive


@torch.inference_mode(mode=False)  # afterwards too, whatever the data has left on
def run(
    model: nn.Module,
    target_layers: list[TargetLayer],
    batches: Iterable[Any],
    config: CalibrationConfig,
    process_group: ProcessGroup,
    options: RunOptions,
) -> Calibration:
    """Calibrate layers that are already chosen; see `evatune.calibrate`.

    The model is one without a wrapper for several devices.
    """
    require_weights(model)
    require_arguments("forward", options.forward, "model, batch")
    require_arguments("rows", options.rows, "activation, batch, layer_name")
    require_arguments("loss", options.loss, "model, batch")
    config = config.resolved()
    state = CalibrationState(model, target_layers, config, process_group, options)
    observer = _observer(state, options)
    if process_group.size > 1:
        _require_same_work(state, options)
    in_lockstep = process_group.size > 1 and is_sharded(model)
    # in shards the others wait for this process's weights and hear no message of ours
    forward_pass = process_group.library_messages if in_lockstep else nullcontext
    device = model_device(model)
    converged = False
    with preserve_model_state(model):
        # loaders draw their seed as soon as they are asked
        source = BatchSource(batches, process_group, config.max_batches, in_lockstep)
        _resume(state, source, observer, options)
        for step in source:
            # making the batch may have turned it on
            with torch.inference_mode(mode=False):
                if step.runs_model:
                    with forward_pass():
                        observer.observe(step)
                    state.nonfinite.check(step.batch_number)
                with full_precision(device):
                    if step.refresh_due:
                        converged = state.refresh(source)
                _report(step, state, source, options)
                if converged:
                    break
                if not step.is_last:
                    _save_checkpoint(state, source, observer, options)
    source.require_batches()
    ended = Status.MAX_BATCHES if source.reached_bound else Status.DATA_EXHAUSTED
    with torch.inference_mode(mode=False), full_precision(device):
        return build_calibration(state, Status.CONVERGED if converged else ended, source.total)


def _observer(state: CalibrationState, options: RunOptions) -> BatchObserver:
    """Return what runs the model on a batch, as the objective needs it."""
    if state.config.needs_loss:
        return LossObserver(state, options)
    if options.loss is not None:
        raise ConfigError(
            "loss= is for objectives that see gradients; choose one with"
            " CalibrationConfig(objective='gradients'), or leave loss out"
        )
    return Observer(state, options)


def _require_same_work(state: CalibrationState, options: RunOptions) -> None:
    """Raise on every process unless all calibrate the same thing, in a way that several can."""
    if options.checkpoint is not None:
        raise ConfigError("a checkpoint is of one process; leave it out, or set distributed=False")
    if not is_additive(state.config.sketch):
        raise ConfigError(
            f"sketch is {state.config.sketch!r}, whose result several processes cannot add up; use"
            " 'nystrom' or 'exact', or calibrate with distributed=False and join the results by"
            " Calibration.merge"
        )
    device = model_device(state.model)
    state.process_group.require_equal(state.identity() | {"device": str(device and device.type)})


def _report(step: Step, state: CalibrationState, source: BatchSource, options: RunOptions) -> None:
    """Tell the caller how far the run is."""
    if options.progress is not None:
        progress = Progress(
            batch=step.batches_done,
            max_batches=max(source.most, step.batches_done),
            rows=state.refresher.rows,
            settled=len(state.convergence.settled),
            layers=len(state.target_layers),
            inputs=len(state.shared_inputs.groups),
            sketch_bytes=sum(group.sketch.nbytes for group in state.shared_inputs.groups),
        )
        options.progress(progress)


def _save_checkpoint(
    state: CalibrationState,
    source: BatchSource,
    observer: BatchObserver,
    options: RunOptions,
) -> None:
    """Write what `_resume` needs, when it is time."""
    checkpoint = options.checkpoint
    if checkpoint is None or not checkpoint.due(source.count):
        return
    tensors, record = state.snapshot()
    position = {"batches": source.count, "stop_early": observer.stop_early}
    checkpoint.write(tensors, state.identity() | record | position)


def _resume(
    state: CalibrationState,
    source: BatchSource,
    observer: BatchObserver,
    options: RunOptions,
) -> None:
    """Go on from the checkpoint's file, if there is one."""
    if options.checkpoint is None:
        return
    saved = options.checkpoint.read(state.identity())
    if saved is None:
        return
    tensors, record = saved
    state.restore(tensors, record)
    source.skip(record.batches)
    observer.stop_early = record.stop_early
