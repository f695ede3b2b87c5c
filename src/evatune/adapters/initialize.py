"""Initialize a `PeftModel`: resolve the options, calibrate, write."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from peft import EvaConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key
from torch import Tensor, nn

from evatune.adapters.lora_layers import (
    LoraTarget,
    describe,
    find_lora_targets,
    pairs,
    tied_layers,
)
from evatune.adapters.scale import choose_scale, completed, scaled_rows
from evatune.adapters.variants import active_positions, require_known_variant
from evatune.adapters.write import _update, write_rows
from evatune.calibration.checkpoint import Checkpoint
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.loop import Progress, run
from evatune.calibration.merge import same_model
from evatune.calibration.result import Calibration
from evatune.capture.recorder import RowsFunction
from evatune.distributed.group import ProcessGroup
from evatune.errors import AdapterError, ConfigError, DataError, TargetError
from evatune.modeling.forward import ForwardFunction
from evatune.modeling.sharding import is_sharded, is_sharded_parameter, require_weights
from evatune.modeling.state import adapters_off, require_trainable
from evatune.modeling.wrappers import (
    adapted,
    adapted_inside,
    is_engine,
    peft_name,
    unwrapped,
)
from evatune.modeling.wrappers import describe as describe_model
from evatune.utils.text import shortened


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
    process_group: ProcessGroup,
    checkpoint: Checkpoint | None = None,
) -> Calibration:
    """`evatune.initialize` for a model; see there. Nothing is written before everything is known to
    fit."""
    whole, outer = model, unwrapped(model)
    model = adapted(outer)
    lora = lora_config(model, adapter_name)
    require_trainable(model)
    scale = choose_scale(scale, lora.eva_config is not None and lora.eva_config.whiten)
    require_known_variant(model, lora, adapter_name)
    lora_targets, unsupported = find_lora_targets(model, adapter_name)
    _check_unsupported(unsupported, on_unsupported, every=not lora_targets)
    if not overwrite:
        require_fresh(lora_targets, adapter_name)
    caps = (
        _caps(lora, lora_targets, adapter_name)
        if rank is None and (config is None or config.rank is None)
        else {}
    )
    given = {"rank": rank, "rho": rho, "budget": budget, "metric": metric}
    if whole is not outer or is_sharded(model):
        _require_writable(
            whole, lora_targets, _settings(config, lora, caps, given), caps, adapter_name
        )
    if isinstance(batches, Calibration):
        idle = {"config": config, "forward": forward, "rows": rows, "progress": progress}
        calibration = _applied(batches, model, lora, lora_targets, caps, given, idle)
    else:
        config = _settings(config, lora, caps, given)
        target_layers = [
            target_layer
            for lora_target in lora_targets
            for target_layer in lora_target.target_layers
        ]
        calibration = run(
            outer,
            target_layers,
            batches,
            config,
            process_group,
            forward=forward,
            rows=rows,
            progress=progress,
            checkpoint=checkpoint,
            caps=caps,
            active=active_positions(lora),
        )
        _require_invoked(calibration, lora)
    floors = _floors(model, lora, lora_targets, adapter_name)
    layers = dict(calibration.layers)
    for name, layer in layers.items():
        layers[name] = replace(layer, cap=caps.get(name), floor=floors.get(name, 0))
    calibration = replace(calibration, layers=layers)
    calibration.require_usable()
    plan = calibration.allocate()
    rows_of_a = {
        name: completed(
            scaled_rows(calibration.spectra[name], rank, scale),
            rank,
            seed=calibration.config.seed + number,
        )
        for number, (name, rank) in enumerate(plan.ranks.items())
    }
    for layer in unsupported.values():
        if any(a.device.type == "meta" for a, _, _ in pairs(layer, adapter_name)):
            usual_start(layer, lora, adapter_name)
    others = {peft_name(path): layer for path, layer in unsupported.items()}
    write_rows(
        model,
        lora,
        lora_targets,
        rows_of_a,
        rank=plan.rank,
        adapter_name=adapter_name,
        others=others,
    )
    return calibration


def _check_unsupported(
    unsupported: Mapping[str, LoraLayer], on_unsupported: str, *, every: bool
) -> None:
    """An error that names the layers EVA cannot initialise, or with "skip" a warning, unless there
    are no others."""
    if on_unsupported not in ("error", "skip"):
        raise ConfigError(f"on_unsupported is {on_unsupported!r}; it must be 'error' or 'skip'")
    if not unsupported:
        return
    kinds = [describe(path, layer) for path, layer in unsupported.items()]
    listed = shortened(kinds)
    if every or on_unsupported == "error":
        raise TargetError(
            f"EVA does not support these adapted layers: {listed}; leave them out with"
            " exclude_modules in the LoraConfig"
            f"{'' if every else ', or start them as PEFT does with on_unsupported=' + repr('skip')}"
        )
    warnings.warn(
        f"EVA does not support these layers, which start as PEFT initialised them: {listed}",
        stacklevel=4,
    )


def lora_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The adapter's config; an AdapterError if there is no such adapter or if it is not plain
    LoRA."""
    inside = adapted_inside(model)
    if len(inside) > 1:
        raise AdapterError(
            f"{type(model).__name__} holds several models with an adapter ({', '.join(inside)}),"
            " and one is started at a time; call evatune.initialize(model, batches) for each,"
            " before optimizers are built"
        )
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise AdapterError(
            f"{type(model).__name__} carries no adapter; build one first: get_peft_model(model,"
            " LoraConfig(r=16, target_modules='all-linear'))"
        )
    if adapter_name not in configs:
        raise AdapterError(
            f"there is no adapter {adapter_name!r}; this model has {', '.join(map(repr, configs))}"
        )
    found = configs[adapter_name]
    if not isinstance(found, LoraConfig) or type(found).__name__ != "LoraConfig":
        raise AdapterError(
            f"adapter {adapter_name!r} is a {type(found).__name__}; EVA initialises LoRA adapters"
            " only"
        )
    return found


def _caps(lora: LoraConfig, lora_targets: list[LoraTarget], adapter_name: str) -> dict[str, int]:
    """The ranks that the adapter's `rank_pattern` gives, by layer."""
    keys = lora.rank_pattern.keys()
    named = [
        lora_target
        for lora_target in lora_targets
        if get_pattern_key(keys, lora_target.name) in keys
    ]
    return {
        target_layer.name: lora_target.layer.r[adapter_name]
        for lora_target in named
        for target_layer in lora_target.target_layers
    }


def _floors(
    model: nn.Module,
    lora: LoraConfig,
    lora_targets: list[LoraTarget],
    adapter_name: str,
) -> dict[str, int]:
    """At least one rank for embeddings whose adapter others depend on.

    PEFT saves the base weights of an embedding that `target_modules` names, rows of new tokens
    among them, only while it carries the adapter. And layers may be tied to its adapter.
    """
    targets = lora.target_modules
    named = isinstance(targets, str) or any(name in EMBEDDING_LAYER_NAMES for name in targets or ())
    endings = {
        lora_target.name: lora_target.name.rpartition(".")[2] for lora_target in lora_targets
    }
    held = [
        lora_target
        for lora_target in lora_targets
        if named and endings[lora_target.name] in EMBEDDING_LAYER_NAMES
    ]
    if tied_layers(model, adapter_name):
        held.append(_embedding(model, lora_targets))
    return {
        target_layer.name: 1 for lora_target in held for target_layer in lora_target.target_layers
    }


def _embedding(model: nn.Module, lora_targets: list[LoraTarget]) -> LoraTarget:
    """The slot of the input embedding, which others are tied to; an AdapterError if there is
    none."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for lora_target in lora_targets:
        if lora_target.layer is embedding:
            return lora_target
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
    config: CalibrationConfig | None,
    lora: LoraConfig,
    caps: Mapping[str, int],
    given: Mapping[str, Any],
) -> CalibrationConfig:
    """The calibration's settings: what the caller says, else what `config` says, else what the
    adapter says."""
    config = config or CalibrationConfig()
    if (
        config.labels_only is None
        and lora.init_lora_weights == "eva"
        and lora.eva_config is not None
    ):
        config = replace(config, **label_settings(lora.eva_config))
    config = _ranked(config, lora, given)
    needed = _needed(config, caps)
    return (
        replace(config, components=needed)
        if config.components is None and needed > config.kept
        else config
    )


def _ranked(
    config: CalibrationConfig, lora: LoraConfig, given: Mapping[str, Any]
) -> CalibrationConfig:
    """`config` with what the redistribution goes by: the caller's word, else its own, else the
    adapter's."""
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
    lora_targets: list[LoraTarget],
    caps: Mapping[str, int],
    given: Mapping[str, Any],
    idle: Mapping[str, Any],
) -> Calibration:
    """The part of a finished calibration that is about these layers, with this adapter's r and ρ.

    Args:
        given: options of the redistribution. idle: options of a pass over batches, which there is
            none of.
    """
    for option, value in idle.items():
        if value is not None:
            raise ConfigError(
                f"{option} is about a pass over batches, and a finished calibration needs none;"
                " leave it out"
            )
    require_weights(model)
    # or raise: with an adapter merged in, these are not the weights that were calibrated
    with adapters_off(model):
        pass
    if calibration.model and not same_model(calibration.model, describe_model(model)):
        raise AdapterError(
            f"the calibration is one of {calibration.model!r} and this model is"
            f" {describe_model(model)!r}; calibrate this model (or, if it is the same under another"
            " name, pass dataclasses.replace(calibration, model=''))"
        )
    target_layers = [
        target_layer for lora_target in lora_targets for target_layer in lora_target.target_layers
    ]
    for target_layer in target_layers:
        layer, here = calibration.layers.get(target_layer.name), target_layer.spec
        known = None if layer is None else layer.spec
        if known != here:
            raise AdapterError(
                f"the calibration does not fit this adapter: {target_layer.name},"
                f" {here.described()}, is {known.described() if known else 'not'} in it; calibrate"
                " this model, with targets that cover the adapter's"
            )
    before = calibration.config
    config = _ranked(replace(before, rank=None, rho=None), lora, given)
    if config.rho is None:
        config = replace(config, rho=before.rho)
    needed, reach = _needed(config, caps), max(before.kept, _needed(before, {}))
    if needed > reach:
        raise ConfigError(
            f"rank {config.rank} at rho {config.rho_or_default:g} may give a layer {needed} ranks,"
            f" and the calibration was made for {reach}; lower rank or rho, or calibrate again with"
            f" CalibrationConfig(components={needed})"
        )
    names = [target_layer.name for target_layer in target_layers]
    return replace(
        calibration,
        spectra={name: calibration.spectra[name] for name in names},
        status={name: calibration.status[name] for name in names},
        layers={name: calibration.layers[name] for name in names},
        config=replace(config, components=before.kept),
    )


def _require_writable(
    model: nn.Module,
    lora_targets: list[LoraTarget],
    config: CalibrationConfig,
    caps: Mapping[str, int],
    adapter_name: str,
) -> None:
    """Raise an AdapterError for a model whose parameters are spoken for already, unless they can be
    written where they are.

    That is under DistributedDataParallel and fully_shard, at ranks that stay; not in FSDP1's and
    DeepSpeed's own storage.
    """
    rank = config.rank_or_default
    stays = config.rho_or_default == 1 and config.budget == "ranks"
    stays = stays and all(
        lora_target.layer.r[adapter_name] == caps.get(lora_target.target_layers[0].name, rank)
        for lora_target in lora_targets
    )
    # DoRA's is replaced
    stays = stays and not any(
        adapter_name in lora_target.layer.lora_magnitude_vector for lora_target in lora_targets
    )
    # An engine's optimizer keeps copies of the parameters and would write them back.
    in_place = not is_engine(model) and all(
        hasattr(p, "device_mesh") for p in model.parameters() if is_sharded_parameter(p)
    )
    if not (stays and in_place):
        where = "in shards" if unwrapped(model) is model else f"inside {type(model).__name__}"
        raise AdapterError(
            f"the model is {where} already, with the adapter's parameters, and redistribution would"
            " replace them; call evatune.initialize before the model is wrapped or sharded (with"
            " one that fits in memory only in shards: evatune.calibrate it, then"
            " evatune.initialize(unsharded, calibration))"
            + (", or pass rho=1 to keep the ranks (without DoRA)" if in_place else "")
        )


def label_settings(eva: EvaConfig) -> dict[str, Any]:
    """Which tokens count, as `EvaConfig` says it, in the words of `CalibrationConfig`."""
    return {
        "labels_only": "auto" if eva.use_label_mask else False,
        "ignore_index": eva.label_mask_value,
    }


def require_fresh(lora_targets: list[LoraTarget], adapter_name: str) -> None:
    """Raise an AdapterError for an adapter that is not at its start, which is BA = 0."""
    for lora_target in lora_targets:
        # a bias of B may be random before training, as PEFT draws it
        for a, b, _ in pairs(lora_target.layer, adapter_name):
            # B = 0 as a rule, but A = 0 of embeddings
            if a.device.type != "meta" and _any(b) and _any(a):
                raise AdapterError(
                    f"adapter {adapter_name!r} is already trained or was initialised with B ≠ 0"
                    f" (for example {lora_target.name}); initialise a fresh one, with"
                    " init_lora_weights=True or 'eva', or start this one over with overwrite=True"
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
