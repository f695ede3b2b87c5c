"""The loop: run batches through the model, sketch what layers see, stop when it has settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evatune.calibration.batches import _NO_DATA, BatchSource, _anyone
from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.convergence import Monitor, is_check, is_due, is_refresh
from evatune.calibration.result import Calibration
from evatune.calibration.status import Status
from evatune.capture import (
    InputRecorder,
    Masks,
    OneHotRows,
    RowSelector,
    SharedInputs,
    TargetLayer,
    selector_for,
)
from evatune.capture.recorder import RowsFunction
from evatune.distributed.group import ProcessGroup
from evatune.errors import ConfigError, NoBatchError
from evatune.modeling.batches import require_arguments
from evatune.modeling.forward import ForwardFunction, call_model, model_device, to_device
from evatune.modeling.sharding import is_sharded, require_weights
from evatune.modeling.state import as_base, full_precision, may_stop_early, states_kept
from evatune.sketch import Sketch, is_additive, make_sketch


@dataclass(frozen=True)
class Progress:
    """What a `progress` callback receives after each batch."""

    batch: int  # batches done
    max_batches: int
    rows: int  # most rows any layer has seen
    settled: int  # layers whose directions have settled, as of the last check
    layers: int


def run(
    model: nn.Module,
    target_layers: list[TargetLayer],
    batches: Iterable[Any],
    config: CalibrationConfig,
    process_group: ProcessGroup,
    *,
    forward: ForwardFunction | None = None,
    rows: RowsFunction | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Checkpoint | None = None,
    caps: Mapping[str, int] | None = None,
    active: Callable[[Any], Tensor] | None = None,
) -> Calibration:
    """`calibrate` for layers that are already chosen, on a model without a wrapper for several
    devices.

    Args:
        active: from a batch to the (B, T) positions at which the adapter acts; None: at all.
        caps: what the stop rule's trial redistribution keeps to, as `allocate` does.
    """
    require_weights(model)
    require_arguments("forward", forward, "model, batch")
    require_arguments("rows", rows, "activation, batch, layer_name")
    labels_only = config.labels_only or False
    # the record says all of it
    config = replace(
        config, rank=config.rank_or_default, rho=config.rho_or_default, labels_only=labels_only
    )
    device, in_step = model_device(model), process_group.size > 1 and is_sharded(model)
    call = forward or call_model
    select = selector_for(
        model, labels_only, config.ignore_index, None if is_sharded(model) else call, active
    )

    def new_sketch(target_layer: TargetLayer, device: torch.device) -> Sketch:
        return make_sketch(
            "counts" if isinstance(target_layer.input_view, OneHotRows) else config.sketch,
            target_layer.in_features,
            config.kept,
            oversampling=config.oversampling,
            center=config.center,
            seed=config.seed,
            device=device,
        )

    def make(name: str) -> Sketch:
        target_layer = next(
            target_layer for target_layer in target_layers if target_layer.name == name
        )
        return new_sketch(
            target_layer, model_device(target_layer.module) or device or torch.device("cpu")
        )

    shared_inputs = SharedInputs(new_sketch, share=rows is None)
    monitor = Monitor(target_layers, shared_inputs, config, process_group, make, caps or {})
    if process_group.size > 1:
        _require_same_work(
            process_group,
            config,
            checkpoint,
            monitor.identity(model) | {"device": str(device and device.type)},
        )
    can_cut = forward is None and may_stop_early(model)
    limit = max(config.max_batches, process_group.size)  # everyone has a turn
    converged = False
    masks = Masks(
        model, target_layers, labels_only=labels_only is True, ignore_index=config.ignore_index
    )
    recorder = InputRecorder(target_layers, shared_inputs, rows, masks)
    with states_kept(model):
        # loaders draw their seed as soon as they are asked
        source = BatchSource(batches, process_group, limit)
        if checkpoint is not None:
            recorder.stop_early = _resume(checkpoint, monitor, source, model)
        for step in range(source.count + 1, source.steps + 1):
            has_batch = anyone_has_batch = source.advance(step)
            if process_group.size == 1 and not has_batch:
                break
            if process_group.size > 1 and (step == 1 or in_step):
                anyone_has_batch = _anyone(process_group, has_batch, step)
            is_last = step == source.steps or (in_step and not anyone_has_batch)
            if has_batch or (in_step and anyone_has_batch):
                batch = source.batch if forward is not None else to_device(source.batch, device)
                # While others have their turn, the data among them, the model is as it was found,
                # without a hook.
                with as_base(model), torch.no_grad():
                    selector = RowSelector() if rows is not None else select(batch)
                    with recorder.watching(batch, selector, watch=has_batch):
                        call(model, batch)
                masks.warn_once()
                recorder.stop_early = recorder.stop_early or (
                    step == 1 and can_cut and recorder.each_called_once
                )
                shared_inputs.end_of_forward()
                monitor.note_nonfinite_rows(source.number(step))
            before, now = (
                min((step - 1) * process_group.size, limit),
                min(step * process_group.size, limit),
            )
            synchronize = is_due(before, now, is_refresh) or (is_last and process_group.size > 1)
            with full_precision(device):
                if synchronize:
                    monitor.synchronize(source.count, source.open)
                    is_last = is_last or not monitor.more
                    monitor.refresh()
                converged = (
                    is_due(before, now, is_check) and process_group.gather(monitor.check())[0]
                )
            if progress is not None:
                progress(
                    Progress(now, limit, monitor.rows, len(monitor.settled), len(target_layers))
                )
            if converged or is_last:
                break
            if checkpoint is not None and checkpoint.due(source.count):
                checkpoint.write(*_snapshot(monitor, source, model, recorder.stop_early))
    total = monitor.batches if process_group.size > 1 else source.count
    if total == 0:
        raise NoBatchError(_NO_DATA)
    # Of several processes some may have ended early, while the turns of the others ran out.
    bounded = total >= config.max_batches or (process_group.size > 1 and monitor.more)
    ended = Status.MAX_BATCHES if bounded else Status.DATA_EXHAUSTED
    with full_precision(device):
        return monitor.result(Status.CONVERGED if converged else ended, total, model)


def _require_same_work(
    process_group: ProcessGroup,
    config: CalibrationConfig,
    checkpoint: Checkpoint | None,
    identity: dict[str, Any],
) -> None:
    """Raise on every process unless all of them calibrate the same thing, in a way that several
    can."""
    if checkpoint is not None:
        raise ConfigError("a checkpoint is of one process; leave it out, or set distributed=False")
    if not is_additive(config.sketch):
        raise ConfigError(
            f"sketch is {config.sketch!r}, whose result several processes cannot add up; use"
            " 'nystrom' or 'exact', or calibrate with distributed=False and join the results by"
            " Calibration.merge"
        )
    process_group.require_equal(identity)


def _snapshot(
    monitor: Monitor, source: BatchSource, model: nn.Module, stop_early: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `_resume` needs, as named tensors and JSON."""
    tensors, record = monitor.state()
    return tensors, monitor.identity(model) | record | {
        "batches": source.count,
        "stop_early": stop_early,
    }


def _resume(
    checkpoint: Checkpoint, monitor: Monitor, source: BatchSource, model: nn.Module
) -> bool:
    """Go on from a checkpoint if there is one; returns whether forward passes may be cut short, as
    far as is known."""
    found = checkpoint.read(monitor.identity(model))
    if found is None:
        return False
    tensors, record = found
    monitor.set_state(tensors, record)
    source.skip(record["batches"])
    return bool(record["stop_early"])
