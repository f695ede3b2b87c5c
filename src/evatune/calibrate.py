"""The loop: run batches through the model, sketch what layers see, stop when it has settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evatune.batches import iterate, require_arguments
from evatune.calibration import Calibration
from evatune.capture import Masks, RowSelector, Sharing, Site, Tap, Tokens, find_sites, selector_for
from evatune.capture.rows import full_precision
from evatune.capture.tap import RowsFunction
from evatune.capture.targets import Targets, adapted, unwrapped
from evatune.checkpoint import Checkpoint
from evatune.config import CalibrationConfig
from evatune.errors import ConfigError, DataError, NoBatchError
from evatune.model import (
    ForwardFunction,
    as_base,
    call_model,
    is_sharded,
    may_cut_short,
    model_device,
    require_weights,
    states_kept,
    to_device,
)
from evatune.monitor import Monitor, is_check, is_refresh, passes
from evatune.processes import Team
from evatune.sketch import Sketch, make_sketch
from evatune.status import Status


@dataclass(frozen=True)
class Progress:
    """What a `progress` callback receives after each batch."""

    batch: int  # batches done
    max_batches: int
    rows: int  # most rows any layer has seen
    settled: int  # layers whose directions have settled, as of the last check
    layers: int


@torch.inference_mode(mode=False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: CalibrationConfig | None = None,
    *,
    targets: Targets = None,
    forward: ForwardFunction | None = None,
    rows: RowsFunction | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Calibration:
    """Find the leading directions of what each layer's input carries on this data.

    Args:
        model: any `nn.Module`, or a `PeftModel` (its adapters stand aside, so the result is the base model's); looked
            for inside DistributedDataParallel, DataParallel and DeepSpeed's engine. Where a module of your
            own, or of sentence-transformers, holds the one model that carries adapters, the whole is run,
            and names are those in that model.
        batches: DataLoader, list, iterator or generator. Each batch is read once, one pass at most. Making them may run
            the model, which is as it was found meanwhile: its modes, its adapters, no hook; nothing of that is counted.
            They must be mixed: of data that comes sorted, the stop rule sees the first kind only and finds it settled.
        config: settings; `CalibrationConfig()` by default.
        targets: which layers, as PEFT names them: "all-linear", a list of names or suffixes, or a regular
            expression for whole names. Default: the layers that carry an adapter, else "all-linear". Besides linear
            layers: convolutions (their own patches; `evatune.initialize` takes those that PEFT's A sees, which pads with
            zeros and has no dilation), embeddings, `nn.MultiheadAttention` (named like it, and "….out_proj") and parameters
            in which the weights of experts are stacked (one entry per expert, "….0", "….1", …).
        forward: `forward(model, batch)` replaces the default call: `model(**batch)` for a mapping or a
            dataclass, `model(*batch)` for a tuple or list, `model(batch)` for a tensor, and for a mapping
            where the model's first argument is none of its keys, as sentence-transformers wants it.
        rows: `rows(activation, batch, layer_name)` → (n, d) replaces the default choice of rows: all tokens that the
            `attention_mask` of the nearest module around the layer does not exclude, else that of the batch; a warning
            names layers that no mask fits, of which all rows count (inside the decoder of an encoder-decoder model:
            its own mask, else those with a label). Layers then no longer share sketches. The activation is the layer's
            input, of a convolution its patches (batch, positions, d), of an embedding the ids, of which it returns (n,).
        progress: called with a `Progress` after each batch.
        checkpoint: a file to go on from after an interruption, see `evatune.checkpoint.Checkpoint`. One process only.

    Several processes of torch.distributed work together (unless `config.distributed` is False): all call this, each
    with batches of its own. They see up to `max_batches` in all, stop together and end with the same directions, bit for
    bit, as one process would that sees their batches in turn, but for the first batch of each: of that, all but one
    process keep what their leading directions hold. Only sums of a sketch's size travel. A model in shards (FSDP,
    ZeRO-3) runs in step: processes whose data has ended repeat their last batch, and it is not counted.

    Returns:
        A `Calibration`: per layer a `Spectrum` and a `Status`. Layers that went wrong are there with a
        status that says how; nothing is raised for them here.

    Raises:
        TargetError: no layer matches. DataError: no batch, or something that is not batches. ConfigError: a `forward` or
        `rows` of other arguments.
        AdapterError: weights on the meta device, or in the shards of DeepSpeed's zero.Init that no engine gathers.
        ProcessError: another process failed, is lost, or has another model, other weights, targets or settings.
        Whatever the model itself raises. In every case the model, its modes, hooks, gradients and the
        random number generators are left as they were.

    The first forward pass runs to its end. The later ones of a transformers model may end at the last watched
    layer, where nothing is lost by it: see `evatune.model.may_cut_short`.

    Cost: the forward passes plus 4·d·l flops per token and distinct layer input of width d, with
    l = components + oversampling; 12·d·l bytes per distinct input.
    """
    model, config = unwrapped(model), config or CalibrationConfig()
    with Team.formed(config.distributed, model_device(model), config.rendezvous_timeout) as team:
        return run(
            model,
            find_sites(adapted(model), targets),
            batches,
            config,
            team,
            forward=forward,
            rows=rows,
            progress=progress,
            checkpoint=checkpoint,
        )


def run(
    model: nn.Module,
    sites: list[Site],
    batches: Iterable[Any],
    config: CalibrationConfig,
    team: Team,
    *,
    forward: ForwardFunction | None = None,
    rows: RowsFunction | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Checkpoint | None = None,
    caps: Mapping[str, int] | None = None,
    active: Callable[[Any], Tensor] | None = None,
) -> Calibration:
    """`calibrate` for layers that are already chosen, on a model without a wrapper for several devices.

    Args:
        active: from a batch to the (B, T) positions at which the adapter acts; None: at all.
        caps: what the stop rule's trial redistribution keeps to, as `allocate` does.
    """
    require_weights(model)
    require_arguments("forward", forward, "model, batch")
    require_arguments("rows", rows, "activation, batch, layer_name")
    labels_only = config.labels_only or False
    # the record says all of it
    config = replace(config, rank=config.rank_or_default, rho=config.rho_or_default, labels_only=labels_only)
    device, in_step = model_device(model), team.size > 1 and is_sharded(model)
    call = forward or call_model
    select = selector_for(model, labels_only, config.ignore_index, None if is_sharded(model) else call, active)

    def newborn(site: Site, device: torch.device) -> Sketch:
        return make_sketch(
            "counts" if isinstance(site.part.view, Tokens) else config.sketch,
            site.in_features,
            config.kept,
            oversampling=config.oversampling,
            center=config.center,
            seed=config.seed,
            device=device,
        )

    def make(name: str) -> Sketch:
        site = next(site for site in sites if site.name == name)
        return newborn(site, model_device(site.module) or device or torch.device("cpu"))

    sharing = Sharing(newborn, share=rows is None)
    monitor = Monitor(sites, sharing, config, team, make, caps or {})
    if team.size > 1:
        _require_same_work(team, config, checkpoint, monitor.identity(model) | {"device": str(device and device.type)})
    can_cut = forward is None and may_cut_short(model)
    limit = max(config.max_batches, team.size)  # everyone has a turn
    converged = False
    masks = Masks(model, sites, labels_only=labels_only is True, ignore_index=config.ignore_index)
    tap = Tap(sites, sharing, rows, masks)
    with states_kept(model):
        feed = _Feed(batches, team, limit)  # loaders draw their seed as soon as they are asked
        if checkpoint is not None:
            tap.cut_short = _resume(checkpoint, monitor, feed, model)
        for turn in range(feed.count + 1, feed.turns + 1):
            came = someone_came = feed.advance(turn)
            if team.size == 1 and not came:
                break
            if team.size > 1 and (turn == 1 or in_step):
                someone_came = _anyone(team, came, turn)
            over = turn == feed.turns or (in_step and not someone_came)
            if came or (in_step and someone_came):
                batch = feed.batch if forward is not None else to_device(feed.batch, device)
                # While others have their turn, the data among them, the model is as it was found, without a hook.
                with as_base(model), torch.no_grad():
                    selector = RowSelector() if rows is not None else select(batch)
                    with tap.watching(batch, selector, watch=came):
                        call(model, batch)
                masks.warn_once()
                tap.cut_short = tap.cut_short or (turn == 1 and can_cut and tap.each_called_once)
                sharing.end_of_forward()
                monitor.note_bad_rows(feed.number(turn))
            before, now = min((turn - 1) * team.size, limit), min(turn * team.size, limit)
            meet = passes(before, now, is_refresh) or (over and team.size > 1)
            with full_precision(device):
                if meet:
                    monitor.meet(feed.count, feed.open)
                    over = over or not monitor.more
                    monitor.refresh()
                converged = passes(before, now, is_check) and team.gather(monitor.check())[0]
            if progress is not None:
                progress(Progress(now, limit, monitor.rows, len(monitor.settled), len(sites)))
            if converged or over:
                break
            if checkpoint is not None and checkpoint.due(feed.count):
                checkpoint.write(*_snapshot(monitor, feed, model, tap.cut_short))
    total = monitor.batches if team.size > 1 else feed.count
    if total == 0:
        raise NoBatchError(_NO_DATA)
    # Of several processes some may have ended early, while the turns of the others ran out.
    bounded = total >= config.max_batches or (team.size > 1 and monitor.more)
    ended = Status.MAX_BATCHES if bounded else Status.DATA_EXHAUSTED
    with full_precision(device):
        return monitor.result(Status.CONVERGED if converged else ended, total, model)


_NO_DATA = "batches is empty: not one batch came; give a DataLoader, list or generator with data"
_END = object()


class _Feed:
    """This process's batches, one per turn: turn t of process p is batch (t - 1)·size + p + 1 of them all."""

    def __init__(self, batches: Iterable[Any], team: Team, limit: int) -> None:
        self._data = iterate(batches)
        self._team = team
        self._limit = limit
        self.turns = -(-limit // team.size)
        self.count = 0  # batches so far
        self.open = True  # there may be more
        self.batch: Any = None  # the last one

    def number(self, turn: int) -> int:
        """Counted from 1, over all processes."""
        return (turn - 1) * self._team.size + self._team.rank + 1

    def advance(self, turn: int) -> bool:
        """Take the batch of this turn; false if there is none for this process."""
        self.open = self.open and self.number(turn) <= self._limit
        batch = next(self._data, _END) if self.open else _END
        self.open = batch is not _END
        if self.open:
            self.batch, self.count = batch, self.count + 1
        return self.open

    def skip(self, count: int) -> None:
        """Read batches that were seen before an interruption."""
        for turn in range(1, count + 1):
            if not self.advance(turn):
                raise DataError(
                    f"the data ended after {turn - 1} batches, but {count} were seen before the interruption; resume with "
                    "the same data"
                )


def _anyone(team: Team, came: bool, turn: int) -> bool:
    """Whether any process has a batch in this turn; in the first one all must."""
    everyone = team.gather(came)
    lacking = [str(rank) for rank, has in enumerate(everyone) if not has]
    if turn == 1 and len(lacking) == team.size:
        raise NoBatchError(_NO_DATA)
    if turn == 1 and lacking:
        raise DataError(
            f"process {', '.join(lacking)} of {team.size} got not one batch; give every process data of its own, or start "
            "fewer processes"
        )
    return any(everyone)


def _require_same_work(
    team: Team, config: CalibrationConfig, checkpoint: Checkpoint | None, identity: dict[str, Any]
) -> None:
    """Raise on every process unless all of them calibrate the same thing, in a way that several can."""
    if checkpoint is not None:
        raise ConfigError("a checkpoint is of one process; leave it out, or set distributed=False")
    if config.sketch == "incremental":
        raise ConfigError(
            "sketch is 'incremental', whose result several processes cannot add up; use 'nystrom' or 'exact', or calibrate "
            "with distributed=False and join the results by Calibration.merge"
        )
    team.require_equal(identity)


def _snapshot(monitor: Monitor, feed: _Feed, model: nn.Module, cut_short: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `_resume` needs, as named tensors and JSON."""
    tensors, record = monitor.state()
    return tensors, monitor.identity(model) | record | {"batches": feed.count, "cut_short": cut_short}


def _resume(checkpoint: Checkpoint, monitor: Monitor, feed: _Feed, model: nn.Module) -> bool:
    """Go on from a checkpoint if there is one; returns whether forward passes may be cut short, as far as is known."""
    found = checkpoint.read(monitor.identity(model))
    if found is None:
        return False
    tensors, record = found
    monitor.set_state(tensors, record)
    feed.skip(record["batches"])
    return bool(record["cut_short"])
