"""Initialize a `PeftModel`: resolve the options, calibrate, write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from peft import LoraConfig
from torch import nn

from evatune.adapters.adapter import LoraAdapter, lora_config
from evatune.adapters.lora_layers import describe, lora_matrix_pairs
from evatune.adapters.options import InitializeOptions, needed_components
from evatune.adapters.variants import active_positions, require_known_variant
from evatune.adapters.write import reset_to_default_init, write_rows
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.loop import run
from evatune.calibration.merge import same_model
from evatune.calibration.result import Calibration
from evatune.choices import (
    DEFAULT_SCALE,
    ON_UNSUPPORTED,
    SCALES,
    OnUnsupported,
    Scale,
    require_choice,
)
from evatune.distributed.group import ProcessGroup
from evatune.errors import AdapterError, ConfigError, DataError, TargetError
from evatune.modeling.sharding import is_sharded, is_sharded_parameter, require_weights
from evatune.modeling.state import adapters_off, require_trainable
from evatune.modeling.wrappers import adapted, is_engine, unwrapped
from evatune.modeling.wrappers import describe as describe_model
from evatune.ranks.allocation import require_wide_enough
from evatune.scaling import pad_with_random_rows, scaled_rows
from evatune.utils.text import shortened
from evatune.utils.warn import warn

_USUAL_SCALING = 0.5  # α/r from which on it is that of plain LoRA (1 or 2), and not of the paper


def initialize_model(
    model: nn.Module,
    batches: Iterable[Any] | Calibration,
    options: InitializeOptions,
    process_group: ProcessGroup,
) -> Calibration:
    """Run `evatune.initialize` for a model; see there.

    Nothing is written before everything is known to fit.
    """
    outer = unwrapped(model)
    peft_model = adapted(outer)
    lora = lora_config(peft_model, options.adapter_name)
    require_trainable(peft_model)
    scale = resolve_scale(lora, options.scale)
    require_known_variant(peft_model, lora, options.adapter_name)
    adapter = LoraAdapter.find(peft_model, options.adapter_name)
    _check_unsupported(adapter, options.on_unsupported)
    if not options.overwrite:
        adapter.require_fresh()
    caps = adapter.pattern_ranks() if options.keeps_rank_pattern else {}
    settings = options.settings(lora, caps)
    if model is not outer or is_sharded(peft_model):
        _require_writable(model, adapter, settings, caps)

    if isinstance(batches, Calibration):
        calibration = _from_finished_calibration(batches, adapter, options, caps)
    else:
        process_group.require_equal(_start_settings(lora, scale), "start the same adapter")
        run_options = replace(options.run, caps=caps, active=active_positions(lora))
        specs = [target_layer.spec for target_layer in adapter.target_layers]
        require_wide_enough(specs, settings.redistribution, caps)
        calibration = run(
            outer, adapter.target_layers, batches, settings, process_group, run_options
        )
        _require_invoked(calibration, adapter)
    calibration = _with_limits(calibration, caps, adapter.least_ranks())
    calibration.require_usable()

    _write(adapter, calibration, scale)
    if scale == "paper" and process_group.rank == 0:
        _warn_of_long_steps(adapter, calibration)
    return calibration


def calibration_settings(model: nn.Module, config: CalibrationConfig) -> CalibrationConfig:
    """Return the settings of a calibration of an adapted model that writes to no adapter.

    What `config` leaves open is as the config of the model's one LoRA adapter says. Where there is
    not one but several, or none of LoRA's, nothing is asked. There are no fewer components than
    without an adapter, since the calibration may be for another one.
    """
    loras = {
        name: lora
        for name, lora in model.peft_config.items()  # type: ignore[operator,union-attr]
        if isinstance(lora, LoraConfig)
    }
    if len(loras) != 1:
        return config
    (name,) = loras
    options = InitializeOptions(config=config, adapter_name=name)
    adapter = LoraAdapter.find(model, name)
    caps = adapter.pattern_ranks() if options.keeps_rank_pattern else {}
    settings = options.settings(adapter.config, caps)
    usual = config.n_components
    return settings if settings.n_components >= usual else replace(settings, components=usual)


def resolve_scale(lora: LoraConfig, scale: Scale | None) -> Scale:
    """Return the caller's scale, else what `EvaConfig.whiten` of the adapter's config says.

    The config says it before the adapter is written, and not after.

    Raises:
        ConfigError: a scale that does not exist, or one that contradicts `whiten`.
    """
    whiten = lora.eva_config is not None and lora.eva_config.whiten
    if scale is None:
        return "whiten" if whiten else DEFAULT_SCALE
    require_choice("scale", scale, SCALES)
    if whiten and scale != "whiten":
        raise ConfigError(
            f"scale is {scale!r} but the adapter's EvaConfig says whiten=True; leave out one of the"
            " two, or pass scale='whiten'"
        )
    return scale


def _start_settings(lora: LoraConfig, scale: Scale) -> dict[str, Any]:
    """Return what, besides the calibration, determines the adapter's start."""
    return {
        "scale": scale,
        "lora_alpha": lora.lora_alpha,
        "alpha_pattern": dict(lora.alpha_pattern),
        "use_rslora": lora.use_rslora,
    }


def _check_unsupported(adapter: LoraAdapter, on_unsupported: OnUnsupported) -> None:
    """Raise a TargetError that names the layers EVA cannot initialize, or with "skip" warn.

    Where there are no other layers there is nothing to skip to, and it is an error as well.
    """
    require_choice("on_unsupported", on_unsupported, ON_UNSUPPORTED)
    if not adapter.others:
        return
    kinds = [describe(name, layer) for name, layer in adapter.others.items()]
    unsupported = shortened(kinds)
    if not adapter.targets or on_unsupported == "error":
        way_out = ", or start them as PEFT does with on_unsupported='skip'"
        raise TargetError(
            f"EVA does not support these adapted layers: {unsupported}; leave them out with"
            f" exclude_modules in the LoraConfig{way_out if adapter.targets else ''}"
        )
    warn(f"EVA does not support these layers, which start as PEFT initialized them: {unsupported}")


def _require_writable(
    model: nn.Module,
    adapter: LoraAdapter,
    config: CalibrationConfig,
    caps: Mapping[str, int],
) -> None:
    """Raise an AdapterError for a model that is wrapped or sharded, unless it can be written to.

    That is under DistributedDataParallel and fully_shard, at ranks that stay; not in FSDP1's and
    DeepSpeed's own storage, which hold the parameters already.
    """
    # An engine's optimizer keeps copies of the parameters and would write them back.
    in_place = not is_engine(model) and all(
        hasattr(parameter, "device_mesh")
        for parameter in model.parameters()
        if is_sharded_parameter(parameter)
    )
    if in_place and _parameters_stay(adapter, config, caps):
        return
    where = "in shards" if unwrapped(model) is model else f"inside {type(model).__name__}"
    way_out = ", or pass rho=1 to keep the ranks (without DoRA)" if in_place else ""
    raise AdapterError(
        f"the model is {where} already, with the adapter's parameters, and redistribution would"
        " replace them; call evatune.initialize before the model is wrapped or sharded (with"
        " one that fits in memory only in shards: evatune.calibrate it, then"
        f" evatune.initialize(unsharded, calibration)){way_out}"
    )


def _parameters_stay(
    adapter: LoraAdapter, config: CalibrationConfig, caps: Mapping[str, int]
) -> bool:
    """Return whether writing replaces no parameter: ranks are what they were, and no DoRA."""
    if config.redistribution.rho != 1 or config.budget != "ranks":
        return False
    for target in adapter.targets:
        rank = caps.get(target.target_layers[0].name, config.redistribution.rank)
        if target.layer.r[adapter.name] != rank:
            return False
        if adapter.name in target.layer.lora_magnitude_vector:
            return False
    return True


def _from_finished_calibration(
    calibration: Calibration,
    adapter: LoraAdapter,
    options: InitializeOptions,
    caps: Mapping[str, int],
) -> Calibration:
    """Return what a finished calibration says of these layers, with this adapter's r and ρ."""
    _require_no_run(options)
    require_weights(adapter.model)
    # or raise: with an adapter merged in, these are not the weights that were calibrated
    with adapters_off(adapter.model):
        pass
    _require_same_model(calibration, adapter)
    before = calibration.config
    config = options.ranks.resolve(replace(before, rank=None, rho=None), adapter.config)
    if config.rho is None:
        config = replace(config, rho=before.rho)
    needed = needed_components(config, caps)
    available = max(before.n_components, needed_components(before, {}))
    if needed > available:
        raise ConfigError(
            f"rank {config.rank} at rho {config.redistribution.rho:g} may give a layer {needed}"
            f" ranks, and the calibration was made for {available}; lower rank or rho, or calibrate"
            f" again with CalibrationConfig(components={needed})"
        )
    names = [target_layer.name for target_layer in adapter.target_layers]
    return replace(
        calibration,
        spectra={name: calibration.spectra[name] for name in names},
        status={name: calibration.status[name] for name in names},
        layers={name: calibration.layers[name] for name in names},
        config=replace(config, components=before.n_components),
    )


def _require_no_run(options: InitializeOptions) -> None:
    """Raise a ConfigError for options of a pass over batches, where there is none."""
    of_a_run = {
        "config": options.config,
        "forward": options.run.forward,
        "rows": options.run.rows,
        "loss": options.run.loss,
        "progress": options.run.progress,
        "checkpoint": options.run.checkpoint,
    }
    for option, value in of_a_run.items():
        if value is not None:
            raise ConfigError(
                f"{option} is about a pass over batches, and a finished calibration needs none;"
                " leave it out"
            )


def _require_same_model(calibration: Calibration, adapter: LoraAdapter) -> None:
    """Raise an AdapterError unless the calibration is of this model and covers its adapter."""
    model = describe_model(adapter.model)
    if calibration.model and not same_model(calibration.model, model):
        raise AdapterError(
            f"the calibration is one of {calibration.model!r} and this model is"
            f" {model!r}; calibrate this model (or, if it is the same under another"
            " name, pass dataclasses.replace(calibration, model=''))"
        )
    for target_layer in adapter.target_layers:
        layer, here = calibration.layers.get(target_layer.name), target_layer.spec
        known = None if layer is None else layer.spec
        if known != here:
            raise AdapterError(
                f"the calibration does not fit this adapter: {target_layer.name},"
                f" {here.described()}, is {known.described() if known else 'not'} in it; calibrate"
                " this model, with targets that cover the adapter's"
            )


def _require_invoked(calibration: Calibration, adapter: LoraAdapter) -> None:
    """Raise a DataError if an adapter that acts from certain tokens on never would on this data."""
    invocation = adapter.config.alora_invocation_tokens
    if invocation and not any(spectrum.rows for spectrum in calibration.spectra.values()):
        raise DataError(
            f"the adapter acts from alora_invocation_tokens={invocation} on, which occur in no "
            "batch; give the batches that it will be trained on, with these tokens in every text"
        )


def _with_limits(
    calibration: Calibration, caps: Mapping[str, int], floors: Mapping[str, int]
) -> Calibration:
    """Return the calibration with the most and the fewest ranks that each layer may get."""
    layers = {
        name: replace(layer, cap=caps.get(name), floor=floors.get(name, 0))
        for name, layer in calibration.layers.items()
    }
    return replace(calibration, layers=layers)


def _write(adapter: LoraAdapter, calibration: Calibration, scale: Scale) -> None:
    """Write the calibration's directions into the adapter, at the ranks that its plan gives."""
    plan = calibration.allocate()
    rows_of_a = {}
    for number, (name, rank) in enumerate(plan.ranks.items()):
        rows = scaled_rows(calibration.spectra[name], rank, scale)
        rows_of_a[name] = pad_with_random_rows(
            rows, rank, scale, seed=calibration.config.seed + number
        )
    for layer in adapter.others.values():
        if any(a.device.type == "meta" for a, _, _ in lora_matrix_pairs(layer, adapter.name)):
            reset_to_default_init(layer, adapter)
    write_rows(adapter, rows_of_a, plan.rank)


def _warn_of_long_steps(adapter: LoraAdapter, calibration: Calibration) -> None:
    """Warn where LoRA's usual α meets unit rows, for which the paper sets α to 1.

    The first steps are then κ times as long as LoRA's. On narrow models its rate is right or nearly
    right all the same; on wide ones κ is larger.
    """
    scalings = [target.layer.scaling.get(adapter.name, 0.0) for target in adapter.targets]
    scaling = median(scalings)
    if scaling < _USUAL_SCALING:
        return
    ratio = f"{median(calibration.step_ratios('paper').values()):.3g}"
    warn(
        f"scale='paper' with α/r = {scaling:g}: B's first steps change the outputs {ratio} times as"
        " much as LoRA's do at the same learning rate; should training diverge, lower a rate that"
        f" suits LoRA, by {ratio} at most (calibration.learning_rate(lora_rate, scale='paper')), or"
        " pass scale='matched' and keep it"
    )
