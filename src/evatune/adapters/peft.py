"""Writes a calibration into the LoRA layers of a `PeftModel`, in place."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key
from torch import Tensor, nn

from evatune.adapters.layers import Slot, describe, find_slots, matrices_of, pairs, tied_layers
from evatune.adapters.scale import choose_scale, completed, scaled_rows
from evatune.adapters.variants import active_positions, require_known_variant
from evatune.calibrate import Progress, run
from evatune.calibration import Calibration
from evatune.capture.tap import RowsFunction
from evatune.capture.targets import (
    adapted,
    adapted_inside,
    adapters_off,
    is_engine,
    peft_name,
    peft_names,
    unwrapped,
)
from evatune.checkpoint import Checkpoint
from evatune.config import CalibrationConfig
from evatune.errors import AdapterError, ConfigError, DataError, TargetError
from evatune.merge import same_model
from evatune.model import ForwardFunction, is_part, is_sharded, model_device, require_trainable, require_weights
from evatune.model import describe as describe_model
from evatune.monitor import layer_of
from evatune.processes import Team


def initialize_model(
    model: nn.Module,
    batches: Iterable[Any] | Calibration,
    *,
    rank: int | None,
    rho: float | None,
    budget: str | None,
    metric: str | None,
    scale: str | None,
    config: CalibrationConfig | None,
    forward: ForwardFunction | None,
    rows: RowsFunction | None,
    adapter_name: str,
    overwrite: bool,
    progress: Callable[[Progress], None] | None,
    on_unsupported: str,
    team: Team,
    checkpoint: Checkpoint | None = None,
) -> Calibration:
    """`evatune.initialize` for a model; see there. Nothing is written before everything is known to fit."""
    whole, outer = model, unwrapped(model)
    model = adapted(outer)
    lora = lora_config(model, adapter_name)
    require_trainable(model)
    scale = choose_scale(scale, lora.eva_config is not None and lora.eva_config.whiten)
    require_known_variant(model, lora, adapter_name)
    slots, odd = find_slots(model, adapter_name)
    _judge_unsupported(odd, on_unsupported, every=not slots)
    if not overwrite:
        require_fresh(slots, adapter_name)
    caps = _caps(lora, slots, adapter_name) if rank is None and (config is None or config.rank is None) else {}
    given = {"rank": rank, "rho": rho, "budget": budget, "metric": metric}
    if whole is not outer or is_sharded(model):
        _require_writable(whole, slots, _settings(config, lora, caps, given), caps, adapter_name)
    if isinstance(batches, Calibration):
        idle = {"config": config, "forward": forward, "rows": rows, "progress": progress}
        calibration = _applied(batches, model, lora, slots, caps, given, idle)
    else:
        config = _settings(config, lora, caps, given)
        sites = [site for slot in slots for site in slot.sites]
        calibration = run(
            outer,
            sites,
            batches,
            config,
            team,
            forward=forward,
            rows=rows,
            progress=progress,
            checkpoint=checkpoint,
            caps=caps,
            active=active_positions(lora),
        )
        _require_invoked(calibration, lora)
    floors = _floors(model, lora, slots, adapter_name)
    layers = dict(calibration.layers)
    for name, layer in layers.items():
        layers[name] = replace(layer, cap=caps.get(name), floor=floors.get(name, 0))
    calibration = replace(calibration, layers=layers)
    calibration.require_usable()
    plan = calibration.allocate()
    rows_of_a = {
        name: completed(scaled_rows(calibration.spectra[name], rank, scale), rank, seed=calibration.config.seed + number)
        for number, (name, rank) in enumerate(plan.ranks.items())
    }
    for layer in odd.values():
        if any(a.device.type == "meta" for a, _, _ in pairs(layer, adapter_name)):
            usual_start(layer, lora, adapter_name)
    others = {peft_name(path): layer for path, layer in odd.items()}
    write_rows(model, lora, slots, rows_of_a, rank=plan.rank, adapter_name=adapter_name, others=others)
    return calibration


def _judge_unsupported(odd: Mapping[str, LoraLayer], on_unsupported: str, *, every: bool) -> None:
    """An error that names the layers EVA cannot initialise, or with "skip" a warning, unless there are no others."""
    if on_unsupported not in ("error", "skip"):
        raise ConfigError(f"on_unsupported is {on_unsupported!r}; it must be 'error' or 'skip'")
    if not odd:
        return
    kinds = [describe(path, layer) for path, layer in odd.items()]
    some = f"{', '.join(kinds[:5])}{f' and {len(kinds) - 5} more' if len(kinds) > 5 else ''}"
    if every or on_unsupported == "error":
        raise TargetError(
            f"EVA does not support these adapted layers: {some}; leave them out with exclude_modules in the LoraConfig"
            f"{'' if every else ', or start them as PEFT does with on_unsupported=' + repr('skip')}"
        )
    warnings.warn(f"EVA does not support these layers, which start as PEFT initialised them: {some}", stacklevel=4)


def lora_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The adapter's config; an AdapterError if there is no such adapter or if it is not plain LoRA."""
    inside = adapted_inside(model)
    if len(inside) > 1:
        raise AdapterError(
            f"{type(model).__name__} holds several models with an adapter ({', '.join(inside)}), and "
            "one is started at a time; call evatune.initialize(model, batches) for each, before optimizers "
            "are built"
        )
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise AdapterError(
            f"{type(model).__name__} carries no adapter; build one first: get_peft_model(model, LoraConfig(r=16, "
            "target_modules='all-linear'))"
        )
    if adapter_name not in configs:
        raise AdapterError(f"there is no adapter {adapter_name!r}; this model has {', '.join(map(repr, configs))}")
    found = configs[adapter_name]
    if not isinstance(found, LoraConfig) or type(found).__name__ != "LoraConfig":
        raise AdapterError(f"adapter {adapter_name!r} is a {type(found).__name__}; EVA initialises LoRA adapters only")
    return found


def _caps(lora: LoraConfig, slots: list[Slot], adapter_name: str) -> dict[str, int]:
    """The ranks that the adapter's `rank_pattern` gives, by layer."""
    keys = lora.rank_pattern.keys()
    named = [slot for slot in slots if get_pattern_key(keys, slot.name) in keys]
    return {site.name: slot.layer.r[adapter_name] for slot in named for site in slot.sites}


def _floors(
    model: nn.Module,
    lora: LoraConfig,
    slots: list[Slot],
    adapter_name: str,
) -> dict[str, int]:
    """At least one rank for embeddings whose adapter others depend on.

    PEFT saves the base weights of an embedding that `target_modules` names, rows of new tokens
    among them, only while it carries the adapter. And layers may be tied to its adapter.
    """
    targets = lora.target_modules
    named = isinstance(targets, str) or any(name in EMBEDDING_LAYER_NAMES for name in targets or ())
    endings = {slot.name: slot.name.rpartition(".")[2] for slot in slots}
    held = [slot for slot in slots if named and endings[slot.name] in EMBEDDING_LAYER_NAMES]
    if tied_layers(model, adapter_name):
        held.append(_embedding(model, slots))
    return {site.name: 1 for slot in held for site in slot.sites}


def _embedding(model: nn.Module, slots: list[Slot]) -> Slot:
    """The slot of the input embedding, which others are tied to; an AdapterError if there is none."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for slot in slots:
        if slot.layer is embedding:
            return slot
    raise AdapterError(
        "ensure_weight_tying is set, and the input embedding carries no adapter to tie others to; "
        "add it to target_modules, or set ensure_weight_tying=False"
    )


def _require_invoked(calibration: Calibration, lora: LoraConfig) -> None:
    """Raise a DataError if an adapter that acts from certain tokens on never would on this data."""
    invocation = lora.alora_invocation_tokens
    if invocation and not any(spectrum.rows for spectrum in calibration.spectra.values()):
        raise DataError(
            f"the adapter acts from alora_invocation_tokens={invocation} on, which occur in no "
            "batch; give the batches that it will be trained on, with these tokens in every text"
        )


def _settings(
    config: CalibrationConfig | None, lora: LoraConfig, caps: Mapping[str, int], given: Mapping[str, Any]
) -> CalibrationConfig:
    """The calibration's settings: what the caller says, else what `config` says, else what the adapter says."""
    config = config or CalibrationConfig()
    if config.labels_only is None and lora.init_lora_weights == "eva" and lora.eva_config is not None:
        config = replace(config, **label_settings(lora.eva_config))
    config = _ranked(config, lora, given)
    needed = _needed(config, caps)
    return replace(config, components=needed) if config.components is None and needed > config.kept else config


def _ranked(config: CalibrationConfig, lora: LoraConfig, given: Mapping[str, Any]) -> CalibrationConfig:
    """`config` with what the redistribution goes by: the caller's word, else its own, else the adapter's."""
    named = {name: value for name, value in given.items() if value is not None}
    if config.rank is None:
        named.setdefault("rank", lora.r)
    if config.rho is None and lora.eva_config is not None:
        named.setdefault("rho", lora.eva_config.rho)
    return replace(config, **named)


def _needed(config: CalibrationConfig, caps: Mapping[str, int]) -> int:
    """Directions of a layer that the redistribution may come to use."""
    return max([replace(config, components=None).kept, *caps.values()])


def _applied(
    calibration: Calibration,
    model: nn.Module,
    lora: LoraConfig,
    slots: list[Slot],
    caps: Mapping[str, int],
    given: Mapping[str, Any],
    idle: Mapping[str, Any],
) -> Calibration:
    """The part of a finished calibration that is about these layers, with this adapter's r and ρ.

    Args:
        given: options of the redistribution. idle: options of a pass over batches, which there is none of.
    """
    for option, value in idle.items():
        if value is not None:
            raise ConfigError(f"{option} is about a pass over batches, and a finished calibration needs none; leave it out")
    require_weights(model)
    with adapters_off(model):  # or raise: with an adapter merged in, these are not the weights that were calibrated
        pass
    if calibration.model and not same_model(calibration.model, describe_model(model)):
        raise AdapterError(
            f"the calibration is one of {calibration.model!r} and this model is {describe_model(model)!r}; calibrate this "
            "model (or, if it is the same under another name, pass dataclasses.replace(calibration, model=''))"
        )
    sites = [site for slot in slots for site in slot.sites]
    for site in sites:
        known, here = calibration.layers.get(site.name), layer_of(site)
        if known is None or known.shape != here.shape:
            raise AdapterError(
                f"the calibration does not fit this adapter: {site.name}, {here.described()}, is "
                f"{known.described() if known else 'not'} in it; calibrate this model, with targets that cover the adapter's"
            )
    before = calibration.config
    config = _ranked(replace(before, rank=None, rho=None), lora, given)
    if config.rho is None:
        config = replace(config, rho=before.rho)
    needed, reach = _needed(config, caps), max(before.kept, _needed(before, {}))
    if needed > reach:
        raise ConfigError(
            f"rank {config.rank} at rho {config.rho_or_default:g} may give a layer {needed} ranks, and the calibration was "
            f"made for {reach}; lower rank or rho, or calibrate again with CalibrationConfig(components={needed})"
        )
    names = [site.name for site in sites]
    return replace(
        calibration,
        spectra={name: calibration.spectra[name] for name in names},
        status={name: calibration.status[name] for name in names},
        layers={name: calibration.layers[name] for name in names},
        config=replace(config, components=before.kept),
    )


def _require_writable(
    model: nn.Module, slots: list[Slot], config: CalibrationConfig, caps: Mapping[str, int], adapter_name: str
) -> None:
    """Raise an AdapterError for a model whose parameters are spoken for already, unless they can be written where they are.

    That is under DistributedDataParallel and fully_shard, at ranks that stay; not in FSDP1's and DeepSpeed's own storage.
    """
    rank = config.rank_or_default
    stays = config.rho_or_default == 1 and config.budget == "ranks"
    stays = stays and all(slot.layer.r[adapter_name] == caps.get(slot.sites[0].name, rank) for slot in slots)
    stays = stays and not any(adapter_name in slot.layer.lora_magnitude_vector for slot in slots)  # DoRA's is replaced
    # An engine's optimizer keeps copies of the parameters and would write them back.
    in_place = not is_engine(model) and all(hasattr(p, "device_mesh") for p in model.parameters() if is_part(p))
    if not (stays and in_place):
        where = "in shards" if unwrapped(model) is model else f"inside {type(model).__name__}"
        raise AdapterError(
            f"the model is {where} already, with the adapter's parameters, and redistribution would replace them; call "
            "evatune.initialize before the model is wrapped or sharded (with one that fits in memory only in shards: "
            "evatune.calibrate it, then evatune.initialize(unsharded, calibration))"
            + (", or pass rho=1 to keep the ranks (without DoRA)" if in_place else "")
        )


def label_settings(eva: EvaConfig) -> dict[str, Any]:
    """Which tokens count, as `EvaConfig` says it, in the words of `CalibrationConfig`."""
    return {"labels_only": "auto" if eva.use_label_mask else False, "ignore_index": eva.label_mask_value}


def require_fresh(slots: list[Slot], adapter_name: str) -> None:
    """Raise an AdapterError for an adapter that is not at its start, which is BA = 0."""
    for slot in slots:
        for a, b, _ in pairs(slot.layer, adapter_name):  # a bias of B may be random before training, as PEFT draws it
            # B = 0 as a rule, but A = 0 of embeddings
            if a.device.type != "meta" and _any(b) and _any(a):
                raise AdapterError(
                    f"adapter {adapter_name!r} is already trained or was initialised with B ≠ 0 (for example {slot.name}); "
                    "initialise a fresh one, with init_lora_weights=True or 'eva', or start this one over with "
                    "overwrite=True"
                )


def _any(parameter: Tensor) -> bool:
    """Whether a value is not zero, on any process that holds a part of it."""
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return bool(whole.any())


def usual_start(layer: LoraLayer, lora: LoraConfig, adapter_name: str) -> None:
    """Have PEFT initialise a layer as it does by default."""
    usual = copy.copy(lora)
    usual.init_lora_weights = True
    _update(layer, layer.r[adapter_name], layer.lora_alpha[adapter_name], usual, adapter_name)


def _update(layer: LoraLayer, rank: int, alpha: float, config: LoraConfig, adapter_name: str) -> None:
    """PEFT's new parameters for a layer, where its weights are, whatever torch's default device is."""
    with model_device(layer.get_base_layer()) or torch.device("cpu"):
        layer.update_layer(adapter_name, r=rank, lora_alpha=alpha, config=config)


@torch.no_grad()
def write_rows(
    model: nn.Module,
    lora: LoraConfig,
    slots: list[Slot],
    rows: Mapping[str, Tensor],  # site → its rows of A, (rank, in); no rows: the layer carries the adapter no more
    *,
    rank: int,
    adapter_name: str,
    others: Mapping[str, LoraLayer] | None = None,
) -> None:
    """Give each layer A, rank, B = 0 and α, and the adapter a config with ranks, α and targets.

    That config is the adapter's alone: the one it was built from may be that of other models and
    adapters too, and stays as it is.

    Args:
        rank: the r that the config gets, and that the scale of every layer refers to.
        others: name, as PEFT's patterns match it → adapted layer that stays as it is.
    """
    others = dict(others or {})
    ranks = {slot.name: len(rows[slot.sites[0].name]) for slot in slots}
    layers = {slot.name: slot.layer for slot in slots if ranks[slot.name]}
    tied = tied_layers(model, adapter_name)
    if tied:
        source = model.get_input_embeddings()  # type: ignore[operator]
        name = next(name for name, layer in (layers | others).items() if layer is source)
        ranks |= dict.fromkeys(tied, ranks.get(name, source.r[adapter_name]))
    alphas = {}
    for name, layer in (layers | tied).items():
        alphas[name] = _new_alpha(layer, lora, ranks[name], rank, adapter_name)
    fresh = copy.copy(lora)
    fresh.init_lora_weights = True  # with BA = 0; not every kind of layer knows "eva"

    adapted = layers | others | tied
    all_ranks = {name: layer.r[adapter_name] for name, layer in others.items()}
    all_ranks |= {name: ranks[name] for name in alphas}
    all_alphas = {name: layer.lora_alpha[adapter_name] for name, layer in others.items()} | alphas
    own = _own_config(lora, rank, all_ranks, all_alphas)
    weights = [name for name, layer in (layers | others).items() if isinstance(layer, ParamWrapper)]
    _aim(own, peft_names(model) - tied.keys(), adapted.keys() - tied.keys() - set(weights))
    if own.target_parameters:
        dropped = ranks.keys() - adapted.keys()
        own.target_parameters = _named(own.target_parameters, weights, dropped)

    with torch.random.fork_rng(devices=[]):  # PEFT draws an A that is overwritten at once
        for slot in slots:
            name = slot.name
            if ranks[name]:
                matrices = matrices_of(slot, rows)
                _fill(slot.layer, matrices, ranks[name], alphas[name], fresh, adapter_name)
            else:
                _remove(model, slot, adapter_name, lora.bias)
        for name, layer in tied.items():
            _tie(layer, source, ranks[name], alphas[name], fresh, adapter_name)
    model.peft_config[adapter_name] = own  # type: ignore[index, operator]


def _own_config(
    lora: LoraConfig,
    rank: int,
    ranks: dict[str, int],
    alphas: dict[str, float],
) -> LoraConfig:
    """A copy of the config that says these ranks and α, and that no layer is left to initialise."""
    own = copy.deepcopy(lora)
    own.r = rank
    own.rank_pattern = _pattern(ranks, rank)
    own.alpha_pattern = _pattern(alphas, lora.lora_alpha)
    # Axolotl and others refuse to merge an adapter that still says "eva".
    own.init_lora_weights, own.eva_config = True, None
    return own


def _new_alpha(layer: LoraLayer, lora: LoraConfig, new: int, rank: int, adapter_name: str) -> float:
    """The α of a layer of the rank `new`, in an adapter whose config will say `rank`."""
    now: float = layer.lora_alpha[adapter_name]
    if lora.eva_config is not None and not lora.eva_config.adjust_scaling_factors:
        return now
    # First back to what it would be at the config's rank: an earlier call may have moved both.
    alpha = _alpha(now, lora.r, layer.r[adapter_name], lora.use_rslora)
    return _alpha(alpha, new, rank, lora.use_rslora)


def _alpha(alpha: float, rank: int, before: int, rslora: bool) -> float:
    """α at `rank` such that the scale, α/r or under rsLoRA α/√r, is what `alpha` gave at the rank `before`."""
    ratio = rank / before
    adjusted = alpha * (ratio**0.5 if rslora else ratio)
    return int(adjusted) if adjusted == int(adjusted) else adjusted


def _fill(layer: LoraLayer, matrices: list[Tensor], rank: int, alpha: float, config: LoraConfig, adapter_name: str) -> None:
    """Give the layer its rank, α and A; B = 0. Parameters keep their dtype, and their identity where they fit."""
    _resize(layer, rank, alpha, config, adapter_name)
    for (a, b, bias), matrix in zip(pairs(layer, adapter_name), matrices, strict=True):
        _put(a, matrix)
        b.zero_()
        if bias is not None:
            bias.zero_()


def _resize(
    layer: LoraLayer,
    rank: int,
    alpha: float,
    config: LoraConfig,
    adapter_name: str,
) -> None:
    """Give the layer its rank and α; A and B are to be filled.

    Parameters keep their dtype, and their identity where they fit.
    """
    old = pairs(layer, adapter_name)
    dtype = old[0][0].dtype
    # PEFT's update_layer makes every adapter of the layer trainable, and a magnitude vector of the base's dtype.
    before = {name: p.requires_grad for name, p in layer.named_parameters()}
    # A trained magnitude vector of DoRA starts anew as well.
    anew = adapter_name in layer.lora_magnitude_vector
    if anew or layer.r[adapter_name] != rank or any(a.device.type == "meta" for a, _, _ in old):
        _update(layer, rank, alpha, config, adapter_name)
        for parameter in (p for pair in pairs(layer, adapter_name) for p in pair if p is not None):
            parameter.data = parameter.data.to(dtype)  # get_peft_model may have chosen float32 above a 16-bit base
        if adapter_name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[adapter_name].to(dtype)
        for name, parameter in layer.named_parameters():
            if name in before:
                parameter.requires_grad_(before[name])
    else:
        for part in (layer, getattr(layer.base_layer, "out_proj", None)):  # attention's output projection goes along
            if isinstance(part, LoraLayer):
                part.lora_alpha[adapter_name] = alpha
                part.scaling[adapter_name] = alpha / (rank**0.5 if config.use_rslora else rank)


def _tie(
    layer: LoraLayer,
    embedding: LoraLayer,
    rank: int,
    alpha: float,
    config: LoraConfig,
    adapter_name: str,
) -> None:
    """Give a tied layer rank and α, and as A and B the transposes of the embedding's B and A."""
    trainable = layer.lora_A[adapter_name].weight.requires_grad
    _resize(layer, rank, alpha, config, adapter_name)
    a, b, _ = pairs(embedding, adapter_name)[0]
    for part, source in ((layer.lora_A[adapter_name], b), (layer.lora_B[adapter_name], a)):
        if part.weight.data_ptr() != source.data_ptr():
            part.weight = nn.Parameter(source.t(), trainable)


def _put(parameter: Tensor, value: Tensor) -> None:
    """Copy `value` into a parameter, or this process's part of it into the shard that is here."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)


def _remove(model: nn.Module, slot: Slot, adapter_name: str, bias: str) -> None:
    """Take the adapter off a layer, and the wrapper with it unless another adapter needs it.

    Args:
        bias: which biases the adapter trains, as `LoraConfig` says it.
    """
    layer = slot.layer
    if set(layer.r) == {adapter_name}:
        # Looked up, for a wrapper around this one may be gone.
        path = next(path for path, module in model.named_modules() if module is layer)
        parent, _, child = path.rpartition(".")
        plain = layer.get_base_layer()
        if isinstance(layer, MultiheadAttention):
            plain = layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        elif slot.is_parameter:
            plain = layer.base_layer  # another parameter of the module may have a wrapper too
        setattr(model.get_submodule(parent), child, plain)
        if bias == "lora_only" and getattr(plain, "bias", None) is not None:
            plain.bias.requires_grad_(False)  # PEFT would not save it
        return
    with _kept(layer):
        layer.delete_adapter(adapter_name)


@contextmanager
def _kept(layer: LoraLayer) -> Iterator[None]:
    """PEFT activates another adapter on a layer that loses its active one; here every other stays as it was."""
    active = list(layer.active_adapters)
    trainable = {name: p.requires_grad for name, p in layer.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it activates another adapter, which is undone below
        yield
    layer._active_adapter = active
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trainable[name])


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """A PEFT pattern that gives each layer its value, with as few entries as that takes.

    PEFT takes the first key that a layer's name ends in. So longer names come first, and a layer with the default
    value needs an entry where another's name would match it.
    """
    pattern = {_escaped(name): value for name, value in values.items() if value != default}
    pattern |= {
        _escaped(name): default
        for name in values
        if get_pattern_key(pattern.keys(), name) in pattern.keys() - {_escaped(name)}
    }
    pattern |= {_escaped(name): value for name, value in values.items() if value != default}
    return dict(sorted(pattern.items(), key=lambda item: -len(item[0])))


def _escaped(name: str) -> str:
    """The name as a pattern; dots match themselves, and stay as readers of patterns know them."""
    return re.escape(name).replace(r"\.", ".").replace(r"\-", "-")


def _aim(lora: LoraConfig, names: Set[str], kept: Set[str]) -> None:
    """Set `target_modules` so that of the modules `names` those `kept` match and no other.

    What can stay stays as the user wrote it, with all other filters. PEFT saves embeddings that are
    named by endings such as "embed_tokens", and adds up adapters only if all have lists, or none.
    """
    matched = _matched(lora, names)
    if matched == kept:
        return
    spared = matched - kept
    if not kept:
        lora.target_modules = set()
    elif isinstance(lora.target_modules, str):
        lora.target_modules = f"(?!(?:{_any_of(spared)})$)(?:{lora.target_modules})"
    else:
        lora.target_modules = set(_named(lora.target_modules or (), sorted(kept), spared))
    if _matched(lora, names) != kept:
        # A name that must not match ends in one that must: only whole names tell them apart.
        lora.target_modules = _any_of(kept)
        lora.layers_to_transform = lora.layers_pattern = None


def _matched(lora: LoraConfig, names: Set[str]) -> set[str]:
    """The names that PEFT would put the adapter on."""
    return {name for name in names if check_target_module_exists(lora, name)}


def _any_of(names: Set[str]) -> str:
    """A regular expression for these whole names."""
    return "|".join(re.escape(name) for name in sorted(names))


def _named(targets: Iterable[str], kept: list[str], dropped: Set[str]) -> list[str]:
    """The targets that end no name `dropped`, and whole names of those `kept` that are left out.

    In the order of `kept`: that of PEFT's wrappers, where a module has several adapted parameters.
    """
    still = [target for target in targets if not any(_ends(name, target) for name in dropped)]
    named = [next((target for target in still if _ends(name, target)), name) for name in kept]
    return list(dict.fromkeys([*named, *still]))


def _ends(name: str, target: str) -> bool:
    """Whether a name is a target, or ends in it after a dot."""
    return f".{name}".endswith(f".{target}")
