"""The loop: run batches through the model, sketch what layers see, stop when it has settled."""

from __future__ import annotations

import copy
import random
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from evatune.calibration import Calibration, Layer
from evatune.capture import DecoderRows, InputGroup, Sharing, Site, Tap, Tokens, decoder_of, find_sites, selector_for
from evatune.capture.tap import EnoughSeen, RowsFunction
from evatune.capture.targets import Targets, adapters_off
from evatune.config import CalibrationConfig
from evatune.errors import BudgetError, DataError
from evatune.ranks import RankPlan, allocate, rank_shift
from evatune.sketch import Sketch, make_sketch
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

    Returns:
        A `Calibration`: per layer a `Spectrum` and a `Status`. Layers that went wrong are there with a
        status that says how; nothing is raised for them here.

    Raises:
        TargetError: no layer matches. DataError: no batch, or something that is not batches.
        Whatever the model itself raises. In every case the model, its modes, hooks, gradients and the
        random number generators are left as they were.

    The first forward pass runs to its end. The later ones of a transformers model may end at the last watched
    layer, where nothing is lost by it: see `_may_cut_short`.

    Cost: the forward passes plus 4·d·l flops per token and distinct layer input of width d, with
    l = components + oversampling; 12·d·l bytes per distinct input.
    """
    return run(
        model,
        find_sites(model, targets),
        batches,
        config or CalibrationConfig(),
        forward=forward,
        rows=rows,
        progress=progress,
    )


def run(
    model: nn.Module,
    sites: list[Site],
    batches: Iterable[Any],
    config: CalibrationConfig,
    *,
    forward: ForwardFunction | None = None,
    rows: RowsFunction | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Calibration:
    """`calibrate` for layers that are already chosen."""
    labels_only = config.labels_only or False
    # the record says all of it
    config = replace(config, rank=config.rank_or_default, rho=config.rho_or_default, labels_only=labels_only)
    device = model_device(model)
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

    sharing = Sharing(newborn, share=rows is None)
    monitor = _Monitor(sites, sharing, config)
    can_cut = forward is None and _may_cut_short(model)
    ended = Status.DATA_EXHAUSTED
    count = 0
    decoder_rows = partial(DecoderRows, labels_only=labels_only is True, ignore_index=config.ignore_index)
    with as_found(model), Tap(sites, sharing, rows, decoder_of(model), decoder_rows) as tap, torch.no_grad():
        for count, batch in enumerate(islice(iterate(batches), config.max_batches), start=1):
            batch = batch if forward is not None else to_device(batch, device)
            tap.begin(batch, select(batch) if rows is None else None)
            with suppress(EnoughSeen):
                (forward or call_model)(model, batch)
            tap.cut_short = tap.cut_short or (count == 1 and can_cut and tap.each_called_once)
            sharing.end_of_forward()
            monitor.note_bad_rows(count)
            if _is_refresh(count):
                monitor.refresh()
            done = monitor.check(count) if _is_check(count) else False
            if progress is not None:
                progress(Progress(count, config.max_batches, monitor.rows, len(monitor.settled), len(sites)))
            if done:
                ended = Status.CONVERGED
                break
        else:
            if count == config.max_batches:
                ended = Status.MAX_BATCHES
    if count == 0:
        raise DataError("batches is empty: not one batch came; give a DataLoader, list or generator with data")
    return monitor.result(ended, count, model)


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
    offloading, no compiled graph, no other process.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    if not type(base).__module__.startswith("transformers.") or hasattr(model, "_orig_mod"):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not any(
        module._forward_hooks or hasattr(module, "_hf_hook") or module._compiled_call_impl is not None
        for module in model.modules()
    )


class _Monitor:
    """Watches the sketches: bad rows, the stop rule, and the verdict per layer."""

    def __init__(self, sites: list[Site], sharing: Sharing, config: CalibrationConfig) -> None:
        self._sites = sites
        self._sharing = sharing
        self._config = config
        self._latest: dict[InputGroup, Spectrum] = {}  # of the last refresh
        self._spectra: dict[InputGroup, Spectrum] = {}  # of the last check
        self._plan: RankPlan | None = None
        self._bad: dict[str, int] = {}  # layer → first batch with NaN or Inf
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
                    self._bad.setdefault(name, batch)
                    self._sharing.stop_watching(name)

    def refresh(self) -> None:
        """Move every sketch's basis to what the data so far suggests."""
        self._latest = {group: group.sketch.refresh() for group in self._sharing.groups}
        self.rows = max((spectrum.rows for spectrum in self._latest.values()), default=0)

    def check(self, batch: int) -> bool:
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
        return batch >= _MIN_BATCHES and missed <= tolerance * weight and moved <= 2 * tolerance

    def result(self, ended: Status, batches: int, model: nn.Module) -> Calibration:
        spectra, status, layers = {}, {}, {}
        answers = {group: self._answer(group) for group in self._sharing.groups}
        number = {group: index for index, group in enumerate(answers)}
        for site in self._sites:
            group = self._sharing.group_of(site.name)
            spectrum = answers[group] if group else empty(site.in_features, self._config.center)
            spectra[site.name] = spectrum
            status[site.name] = self._verdict(site, spectrum, ended)
            input = number[group] if group else None
            layers[site.name] = replace(_layer(site), input=input, first_bad_batch=self._bad.get(site.name))
        return Calibration(
            spectra=spectra,
            status=status,
            layers=layers,
            config=self._config,
            batches=batches,
            model=_describe(model),
        )

    def _answer(self, group: InputGroup) -> Spectrum:
        """The group's spectrum: the last refresh's, if no row came after it."""
        known = self._latest.get(group)
        return known if known is not None and known.rows == group.sketch.count else group.sketch.spectrum()

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


def _describe(model: nn.Module) -> str:
    """Class and, where the model knows it, name or path of the weights."""
    inner = getattr(model, "get_base_model", lambda: model)()
    source = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    return f"{type(inner).__name__} {source}".strip()
