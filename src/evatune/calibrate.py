"""The loop: run batches through the model, sketch what layers see, stop when it has settled."""

from __future__ import annotations

import copy
import random
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evatune.calibration import Calibration, Layer
from evatune.capture import DecoderRows, InputGroup, Sharing, Site, Tap, Tokens, decoder_of, find_sites, selector_for
from evatune.capture.tap import EnoughSeen, RowsFunction
from evatune.capture.targets import Targets, adapters_off, unwrapped
from evatune.checkpoint import Checkpoint
from evatune.config import CalibrationConfig
from evatune.errors import BudgetError, ConfigError, DataError
from evatune.joint import JointSketches
from evatune.processes import Team
from evatune.ranks import RankPlan, allocate, rank_shift
from evatune.sketch import Sketch, make_sketch, refresh_all
from evatune.spectrum import Spectrum, empty
from evatune.status import Status, shortage

# Two or three batches agree too easily, and the bound costs next to nothing.
_MIN_BATCHES = 4

ForwardFunction = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Progress:
    """What a `progress` callback receives after each batch."""

    batch: int  # batches done
    max_batches: int
    rows: int  # most rows any layer has seen
    settled: int  # layers whose directions have settled, as of the last check
    layers: int


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
        model: any `nn.Module`, or a `PeftModel` (its adapters stand aside, so the result is the base model's).
        batches: DataLoader, list, iterator or generator. Each batch is read once, one pass at most.
        config: settings; `CalibrationConfig()` by default.
        targets: which layers, as PEFT names them: "all-linear", a list of names or suffixes, or a regular
            expression for whole names. Default: the layers that carry an adapter, else "all-linear". Besides linear
            layers: convolutions (their own patches; `evatune.initialize` takes those that PEFT's A sees, which pads with
            zeros and has no dilation), embeddings, `nn.MultiheadAttention` (named like it, and "….out_proj") and parameters
            in which the weights of experts are stacked (one entry per expert, "….0", "….1", …).
        forward: `forward(model, batch)` replaces the default call: `model(**batch)` for a mapping or a
            dataclass, `model(*batch)` for a tuple or list, `model(batch)` for a tensor.
        rows: `rows(activation, batch, layer_name)` → (n, d) replaces the default choice of rows: all tokens
            that `attention_mask` does not exclude (inside the decoder of an encoder-decoder model: its own mask, else
            those with a label). Layers then no longer share sketches. The activation is the layer's input, of a
            convolution its patches (batch, positions, d), of an embedding the ids, of which it returns (n,).
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
        TargetError: no layer matches. DataError: no batch, or something that is not batches.
        ProcessError: another process failed, is lost, or has another model, other weights, targets or settings.
        Whatever the model itself raises. In every case the model, its modes, hooks, gradients and the
        random number generators are left as they were.

    The first forward pass runs to its end. The later ones of a transformers model may end at the last watched
    layer, where nothing is lost by it: see `_may_cut_short`.

    Cost: the forward passes plus 4·d·l flops per token and distinct layer input of width d, with
    l = components + oversampling; 12·d·l bytes per distinct input.
    """
    model, config = unwrapped(model), config or CalibrationConfig()
    with Team.formed(config.distributed, model_device(model)) as team:
        return run(
            model,
            find_sites(model, targets),
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
) -> Calibration:
    """`calibrate` for layers that are already chosen, on a model without a wrapper for several devices."""
    labels_only = config.labels_only or False
    # the record says all of it
    config = replace(config, rank=config.rank_or_default, rho=config.rho_or_default, labels_only=labels_only)
    if team.size > 1:
        _require_same_work(team, model, sites, config, checkpoint)
    device, in_step = model_device(model), team.size > 1 and is_sharded(model)
    select = selector_for(model, labels_only, config.ignore_index)

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
    monitor = _Monitor(sites, sharing, config, team, make)
    can_cut = forward is None and _may_cut_short(model)
    limit = max(config.max_batches, team.size)  # everyone has a turn
    feed = _Feed(batches, team, limit)
    converged = False
    decoder_rows = partial(DecoderRows, labels_only=labels_only is True, ignore_index=config.ignore_index)
    with as_found(model), Tap(sites, sharing, rows, decoder_of(model), decoder_rows) as tap, torch.no_grad():
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
                tap.begin(batch, select(batch) if rows is None else None, watch=came)
                with suppress(EnoughSeen):
                    (forward or call_model)(model, batch)
                tap.cut_short = tap.cut_short or (turn == 1 and can_cut and tap.each_called_once)
                sharing.end_of_forward()
                monitor.note_bad_rows(feed.number(turn))
            before, now = min((turn - 1) * team.size, limit), min(turn * team.size, limit)
            meet = _passes(before, now, _is_refresh) or (over and team.size > 1)
            if meet:
                over = not monitor.meet(feed) or over
                monitor.refresh()
            converged = _passes(before, now, _is_check) and team.gather(monitor.check())[0]
            if progress is not None:
                progress(Progress(now, limit, monitor.rows, len(monitor.settled), len(sites)))
            if converged or over:
                break
            if checkpoint is not None and checkpoint.due(feed.count):
                checkpoint.write(*_snapshot(monitor, feed, model, tap.cut_short))
    total = monitor.batches if team.size > 1 else feed.count
    if total == 0:
        raise DataError(_NO_DATA)
    ended = Status.MAX_BATCHES if total >= config.max_batches else Status.DATA_EXHAUSTED
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
        raise DataError(_NO_DATA)
    if turn == 1 and lacking:
        raise DataError(
            f"process {', '.join(lacking)} of {team.size} got not one batch; give every process data of its own, or start "
            "fewer processes"
        )
    return any(everyone)


def _require_same_work(
    team: Team, model: nn.Module, sites: list[Site], config: CalibrationConfig, checkpoint: Checkpoint | None
) -> None:
    """Raise on every process unless all of them calibrate the same thing, in a way that several can."""
    if checkpoint is not None:
        raise ConfigError("a checkpoint is of one process; leave it out, or set distributed=False")
    if config.sketch == "incremental":
        raise ConfigError(
            "sketch is 'incremental', whose result several processes cannot add up; use 'nystrom' or 'exact', or calibrate "
            "with distributed=False and join the results by Calibration.merge"
        )
    layers = {site.name: [site.in_features, site.out_features] for site in sites}
    facts = {"model": _describe(model), "layers": layers, "config": asdict(config)}
    team.require_equal(facts | {"device": str(getattr(model_device(model), "type", None)), "weights": _fingerprint(sites)})


def _fingerprint(sites: list[Site]) -> list[str]:
    """A few values of each layer's weight, as far as all processes hold the same part of it."""
    heads = [
        (site.name, weight.detach().flatten()[:4].float().cpu().tolist())
        for site in sites
        if (weight := next(site.module.parameters(), None)) is not None
        and weight.is_floating_point()
        and weight.device.type != "meta"
        and not _is_part(weight)
    ]
    return [f"{name} {values}" for name, values in heads]


def _snapshot(monitor: _Monitor, feed: _Feed, model: nn.Module, cut_short: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `_resume` needs, as named tensors and JSON."""
    tensors, record = monitor.state()
    return tensors, monitor.identity(model) | record | {"batches": feed.count, "cut_short": cut_short}


def _resume(checkpoint: Checkpoint, monitor: _Monitor, feed: _Feed, model: nn.Module) -> bool:
    """Go on from a checkpoint if there is one; returns whether forward passes may be cut short, as far as is known."""
    found = checkpoint.read(monitor.identity(model))
    if found is None:
        return False
    tensors, record = found
    monitor.set_state(tensors, record)
    feed.skip(record["batches"])
    return bool(record["cut_short"])


def call_model(model: nn.Module, batch: Any) -> Any:
    """The default forward pass: keywords from a mapping or dataclass, positions from a tuple, else one argument."""
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if is_dataclass(batch) and not isinstance(batch, type):
            return model(**{f.name: getattr(batch, f.name) for f in fields(batch)})
        if isinstance(batch, (tuple, list)):
            return model(*batch)
        return model(batch)
    except TypeError as error:
        error.add_note(
            f"evatune called the model with a batch of type {type(batch).__name__} by its default rule (mapping → "
            "keywords, tuple → positions). If that is not how this model is called, pass forward=lambda model, batch: …"
        )
        raise


def to_device(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on `device`; the caller's containers are not touched."""
    if isinstance(batch, Tensor):
        return batch if device is None else batch.to(device)
    if isinstance(batch, UserDict):  # transformers' BatchEncoding, whose own `to` would change the caller's
        moved = copy.copy(batch)
        moved.data = {key: to_device(value, device) for key, value in batch.items()}
        return moved
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _may_cut_short(model: nn.Module) -> bool:
    """Whether nothing is lost by leaving a forward pass once every watched layer has been called.

    What is left out is the end of the last block, the output embedding and the loss; for a language model
    with a large vocabulary that is much time and most of the memory. Only for transformers' own models, whose
    forward passes have no other effects, and only where nobody else waits for the end: no forward hooks, no
    offloading, no compiled graph, no shard of the model on another process.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    if not type(base).__module__.startswith("transformers.") or hasattr(model, "_orig_mod"):
        return False
    if is_sharded(model):
        return False
    return not any(
        module._forward_hooks or hasattr(module, "_hf_hook") or module._compiled_call_impl is not None
        for module in model.modules()
    )


class _Monitor:
    """Watches the sketches, those of all processes: bad rows, the stop rule, and the verdict per layer."""

    def __init__(
        self, sites: list[Site], sharing: Sharing, config: CalibrationConfig, team: Team, make: Callable[[str], Sketch]
    ) -> None:
        self._sites = sites
        self._sharing = sharing
        self._config = config
        self._team = team
        self._make = make
        self._joint = JointSketches(team, sharing, [site.name for site in sites], make)
        self._latest: dict[InputGroup, Spectrum] = {}  # of the last refresh
        self._spectra: dict[InputGroup, Spectrum] = {}  # of the last check
        self._plan: RankPlan | None = None
        self._bad: dict[str, tuple[int, int]] = {}  # layer → first batch with NaN or Inf, and its process
        self.batches = 0  # of all processes, as of the last meeting
        self.settled: set[str] = set()
        self.rows = 0

    def note_bad_rows(self, batch: int) -> None:
        """Find NaN and Inf, with one wait for the device per batch (and device), however many layers there are."""
        by_device: dict[torch.device, list[InputGroup]] = {}
        for group in self._sharing.groups:
            by_device.setdefault(group.sketch.device, []).append(group)
        for groups in by_device.values():
            finite = torch.stack([group.sketch.finite for group in groups]).tolist()
            for group in (g for g, good in zip(groups, finite, strict=True) if not good):
                for name in group.members:
                    self._bad.setdefault(name, (batch, self._team.rank))
                    self._sharing.stop_watching(name)

    def meet(self, feed: _Feed) -> bool:
        """Hear from the others how far they are and what they found to be bad; false if nobody has more data."""
        everyone = self._team.gather({"batches": feed.count, "open": feed.open, "bad": self._bad})
        self.batches = sum(said["batches"] for said in everyone)
        found = [(name, tuple(place)) for said in everyone for name, place in said["bad"].items()]
        self._bad = dict(sorted(found, key=lambda entry: entry[1], reverse=True))  # the first batch is the one that stays
        for name in self._bad:
            self._sharing.stop_watching(name)
        return any(said["open"] for said in everyone)

    def refresh(self) -> None:
        """Move every sketch's basis to what the data so far suggests."""
        if self._team.size > 1:
            self._latest = self._joint.refresh()
        else:
            groups = self._sharing.groups
            self._latest = dict(zip(groups, refresh_all([group.sketch for group in groups]), strict=True))
        self.rows = max((spectrum.rows for spectrum in self._latest.values()), default=0)

    def check(self) -> bool:
        """After a refresh: true when directions and ranks have both settled since the last check.

        Directions: the mean over layers, weighted by their ranks, of what the previous directions miss. A
        single layer that learns slowly does not hold up the rest; it gets a status of its own.
        An expert weighs as its share of the tokens that the busiest expert got: one that none reach settles never.
        Ranks: twice the tolerance, since ranks move between components of nearly equal worth.
        """
        spectra, tolerance = self._latest, self._config.tolerance
        if tolerance == 0:
            return False
        plan = self._trial_plan(spectra)
        missed, weight = 0.0, 0.0
        self.settled = set()
        busiest: dict[str, int] = {}
        for site in self._sites:
            group = self._sharing.group_of(site.name)
            busiest[site.unit] = max(busiest.get(site.unit, 0), spectra[group].rows if group else 0)
        for site in self._sites:
            group = self._sharing.group_of(site.name)
            before = self._spectra.get(group) if group else None
            used = max(1, plan.ranks[site.name] if plan and site.name in plan.ranks else self._config.rank_or_default)
            gap = _missed(before, spectra[group], used) if group and before else 1.0
            share = 1.0
            if site.part.expert is not None:
                share = spectra[group].rows / max(1, busiest[site.unit]) if group else 0.0
            missed, weight = missed + share * used * gap, weight + share * used
            if gap <= tolerance:
                self.settled.add(site.name)
        moved = rank_shift(self._plan, plan) if self._plan and plan else 1.0
        self._spectra, self._plan = spectra, plan
        return self.batches >= _MIN_BATCHES and missed <= tolerance * weight and moved <= 2 * tolerance

    def result(self, ended: Status, batches: int, model: nn.Module) -> Calibration:
        spectra, status, layers = {}, {}, {}
        # Numbered by the order of the layers, which all processes have in common.
        groups = dict.fromkeys(group for site in self._sites if (group := self._sharing.group_of(site.name)))
        answers = {group: self._answer(group) for group in groups}
        number = {group: index for index, group in enumerate(groups)}
        for site in self._sites:
            group = self._sharing.group_of(site.name)
            spectrum = answers[group] if group else empty(site.in_features, self._config.center)
            spectra[site.name] = spectrum
            status[site.name] = self._verdict(site, spectrum, ended)
            bad = self._bad.get(site.name)
            layers[site.name] = replace(
                _layer(site),
                input=number[group] if group else None,
                first_bad_batch=bad[0] if bad else None,
                bad_process=bad[1] if bad and self._team.size > 1 else None,
            )
        return Calibration(
            spectra=spectra,
            status=status,
            layers=layers,
            config=self._config,
            batches=batches,
            model=_describe(model),
            processes=self._team.size,
            bytes_sent=self._team.bytes_sent,
        )

    def identity(self, model: nn.Module) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit."""
        layers = {site.name: [site.in_features, site.out_features] for site in self._sites}
        return {"model": _describe(model), "layers": layers, "config": asdict(self._config)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the loop has found so far, as named tensors and JSON."""
        tensors: dict[str, Tensor] = {}
        for place, group in enumerate(self._sharing.groups):
            parts = {"sketch": group.sketch.state()}
            parts |= {key: found[group].state() for key, found in self._found().items() if group in found}
            tensors |= {f"{place}.{key}.{name}": t for key, part in parts.items() for name, t in part.items()}
        members = [group.members for group in self._sharing.groups]
        return tensors, {"groups": members, "bad": self._bad, "settled": sorted(self.settled)}

    def set_state(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, key, part = name.split(".", 2)
            parts.setdefault(f"{place}.{key}", {})[part] = tensor
        for number, group in enumerate(self._sharing.arrange(record["groups"], self._make)):
            group.sketch.set_state(parts[f"{number}.sketch"])
            for key, found in self._found().items():
                if f"{number}.{key}" in parts:
                    found[group] = Spectrum.of_state(parts[f"{number}.{key}"])
        self._bad = {name: tuple(place) for name, place in record["bad"].items()}
        for name in self._bad:
            self._sharing.stop_watching(name)
        self.settled = set(record["settled"])
        self._plan = self._trial_plan(self._spectra) if self._spectra else None
        self.rows = max((spectrum.rows for spectrum in self._latest.values()), default=0)

    def _found(self) -> dict[str, dict[InputGroup, Spectrum]]:
        return {"latest": self._latest, "check": self._spectra}

    def _answer(self, group: InputGroup) -> Spectrum:
        """The group's spectrum: the last refresh's, if no row came after it."""
        known = self._latest.get(group)
        if known is not None and (self._team.size > 1 or known.rows == group.sketch.count):
            return known
        return group.sketch.spectrum()

    def _verdict(self, site: Site, spectrum: Spectrum, ended: Status) -> Status:
        if site.name in self._bad:
            return Status.NON_FINITE
        lack: Status | None = Status.NEVER_CALLED
        if self._sharing.group_of(site.name) is not None:
            needed = min(self._config.kept, site.in_features, site.out_features)
            lack = shortage(spectrum.rows, spectrum.total_energy, needed)
        if lack is not None:
            others = (other.name for other in self._sites if other.unit == site.unit)
            routed = site.part.expert is not None and any(self._sharing.group_of(name) for name in others)
            return Status.SELDOM_ROUTED if routed else lack
        if site.name in self.settled:
            return Status.CONVERGED
        return Status.UNSETTLED if ended is Status.CONVERGED else ended

    def _trial_plan(self, spectra: dict[InputGroup, Spectrum]) -> RankPlan | None:
        """The ranks that today's spectra imply, or None while there is too little data for any."""
        config = self._config
        candidates = {}
        for site in self._sites:
            group = self._sharing.group_of(site.name)
            if group is not None:
                candidates[site.name] = _layer(site).candidate(spectra[group])
        try:
            return allocate(
                candidates,
                rank=config.rank_or_default,
                rho=config.rho_or_default,
                budget=config.budget,
                metric=config.metric,
            )
        except BudgetError:
            return None


def _layer(site: Site) -> Layer:
    """The record of a layer that has not been called yet."""
    unit = "" if site.unit == site.name else site.unit
    return Layer(site.in_features, site.out_features, input=None, groups=site.part.groups, unit=unit)


def _missed(before: Spectrum, now: Spectrum, used: int) -> float:
    """Share of the energy in the `used` leading directions of `now` that those of `before` do not reach.

    Measured with the energies of `now`, of which `before` has not seen the latest rows. Unlike a cosine per
    vector it does not care how directions of equal energy rotate among themselves.
    """
    used = min(used, len(before.energies), len(now.energies))
    best = float(now.energies[:used].sum())
    if used == 0 or best <= 0:
        return 0.0
    overlap = (before.directions[:used] @ now.directions.T).square().sum(0)  # (k,) share of each new direction
    return 1 - float((overlap * now.energies).sum()) / best


def _passes(before: int, now: int, is_point: Callable[[int], bool]) -> bool:
    """Whether one of the points lies in (before, now]."""
    return any(is_point(batch) for batch in range(before + 1, now + 1))


def _is_check(batch: int) -> bool:
    """1, 2, 4, 8, …: the stop rule compares with what half the data said."""
    return batch & (batch - 1) == 0


def _is_refresh(batch: int) -> bool:
    """At each check and, from 6 on, halfway to the next: few enough to cost little, and each is a power step."""
    return _is_check(batch) or (batch > 3 and batch % 3 == 0 and _is_check(batch // 3))


def iterate(batches: Iterable[Any]) -> Iterator[Any]:
    """An iterator over batches; a DataError for what is none, or is a single batch."""
    if isinstance(batches, (Tensor, Mapping, str, bytes)):
        raise DataError(
            f"batches is a single {type(batches).__name__}; give an iterable of batches, such as a DataLoader or a list "
            "with this one batch in it"
        )
    try:
        return iter(batches)
    except TypeError:
        raise DataError(
            f"batches is of type {type(batches).__name__}, which cannot be iterated over; give a DataLoader, a list or "
            "a generator of batches"
        ) from None


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and base weights inside; modes, adapters and random states as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # In evaluation mode torch's own transformer layers would pass their inner linear layers by.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=_cuda_devices(model)), adapters_off(model):
            model.eval()
            for module in model.modules():
                # In evaluation mode bitsandbytes packs 4-bit weights on a CPU anew, for good, and they train no more.
                module.training = hasattr(module, "support_avx512bf16_for_cpu")
            yield
    finally:
        for module, training in modes:
            module.training = training
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def model_device(model: nn.Module) -> torch.device | None:
    """Where batches go: the device of the first parameter that has data."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs the other processes, since they hold parts of this model's weights."""
    return any(_is_part(parameter) for parameter in model.parameters())


def _is_part(parameter: nn.Parameter) -> bool:
    """Of a weight in shards: a DTensor (FSDP2), a flat parameter (FSDP1), or one of DeepSpeed's ZeRO-3."""
    return any(hasattr(parameter, mark) for mark in ("device_mesh", "_is_flat_param", "ds_id"))


def _describe(model: nn.Module) -> str:
    """Class and, where the model knows it, name or path of the weights."""
    inner = getattr(model, "get_base_model", lambda: model)()
    source = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    # fully_shard puts a class of its own before the model's.
    kind = next(kind.__name__ for kind in type(inner).__mro__ if not kind.__name__.startswith("FSDP"))
    return f"{kind} {source}".strip()
