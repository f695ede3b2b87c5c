"""PEFT's own names and signatures for EVA, on evatune's engine: change one import, keep the code.

    from evatune.adapters.compat import get_eva_state_dict, initialize_lora_eva_weights

What differs from PEFT 0.21, on purpose:

- The directions are those of `evatune.initialize`: of the uncentered second moment, each batch read
  once, 64 batches at most. `EvaConfig.tau`, the cosine at which PEFT takes a vector as settled,
  becomes the tolerance (1 - tau) / 10 of the stop rule, which speaks of all the energy, where the
  vectors that settle last carry little of it. 0.9 is evatune's default; 0.99, PEFT's, asks for
  directions that hardly depend on the batches drawn; 1 means never to stop early.
- `EvaConfig.whiten` divides each direction by the standard deviation along it, once.
- The label mask is shifted for causal language models: position t predicts label t + 1.
- A state dict may come from the base model or from the `PeftModel`; a dict that fits no layer is an
  error.
- Variants of LoRA that do not fit EVA are refused. Of activated LoRA, rows count that it acts on.
- The caller's mappings, model and batches stay as they are, and an adapter that is trained already
  is refused.
- Afterwards the adapter's config says `init_lora_weights=True`, since nothing is left to
  initialize.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from evatune.adapters.adapter import LoraAdapter, lora_config
from evatune.adapters.lora_layers import LoraTarget
from evatune.adapters.options import with_label_mask
from evatune.adapters.variants import active_positions, require_known_variant
from evatune.adapters.write import reset_to_default_init, write_rows
from evatune.calibration.config import CalibrationConfig
from evatune.calibration.loop import run
from evatune.calibration.options import RunOptions
from evatune.calibration.progress import progress_callback
from evatune.capture import RowSelector, TargetLayer, find_target_layers, selector_for
from evatune.capture.layer_types import is_linear, target_layers_of
from evatune.capture.recorder import RowsFunction
from evatune.capture.row_selection import batch_field
from evatune.choices import Scale
from evatune.distributed.group import ProcessGroup
from evatune.errors import AdapterError, ConfigError, DataError, NoBatchError, TargetError
from evatune.modeling.batches import iterate
from evatune.modeling.forward import model_device, to_device
from evatune.modeling.state import require_trainable
from evatune.modeling.wrappers import peft_name
from evatune.scaling import default_rows, scaled_rows

ModelInputs = Callable[[Any, LoraConfig], Any]
LayerInputs = Callable[[Any, Any, str], Tensor]

# Share of the energy that is in the vectors which settle last, those that `tau` is about.
_ENERGY_SETTLING_LAST = 0.1


@torch.inference_mode(mode=False)
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        LayerInputs | Mapping[str, LayerInputs] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return the matrix A of each layer, at the rank that the redistribution gives it.

    Args:
        model: a `PeftModel`, whose adapted layers are taken, or any model together with
            `peft_config`.
        dataloader: any iterable of batches, also a generator.
        peft_config: what `r`, `target_modules` and `eva_config` are read from. Default: the
            adapter's.
        forward_fn: `forward_fn(model, batch)`. By default mappings are keywords, tuples are
            positions.
        prepare_model_inputs_fn: `fn(batch, peft_config)`; what it returns is `model_input` below.
            None: the batch.
        prepare_layer_inputs_fn: `fn(layer_inputs, model_input, layer_name)` → (n, d), the rows that
            count; `layer_inputs` is the tuple of the layer's positional arguments. A mapping gives
            layers, by their names in `model`, functions of their own. None, and layers that the
            mapping leaves out: all rows, padding too. With both defaults: all tokens but padding
            and, as `EvaConfig.use_label_mask` says, those without a loss.
        adapter_name: which adapter of a `PeftModel`.
        gather_distributed_inputs: with torch.distributed, the processes calibrate together, each on
            batches of its own, and get the same result; sums travel, inputs do not. False: each
            process for itself.
        show_progress_bar: as `progress="auto"` of `evatune.initialize`; False: nothing is shown.

    Returns:
        Name of the layer in `model` (in a `PeftModel` with its prefix) → (rank, in) float32 on the
        model's device, also (0, in). No two tensors share storage, so safetensors saves it. PEFT's
        own `initialize_lora_eva_weights` takes it. Empty where no layer is linear, which is all
        that PEFT's EVA knows.

    Raises:
        AdapterError: no config, or one with a `rank_pattern`.
        ConfigError: a mapping with names that are not there.
        DataError: no batch. TargetError: no layer.
        LayerError, BudgetError: as for `evatune.initialize`.

    All of these are ValueErrors.
    """
    if peft_config is None:
        if not hasattr(model, "peft_config"):
            raise AdapterError(
                "peft_config is required if model is not a PeftModel; pass"
                " LoraConfig(init_lora_weights='eva')"
            )
        peft_config = lora_config(model, adapter_name)
    if peft_config.rank_pattern:
        raise AdapterError(
            "the LoraConfig has a rank_pattern, which redistribution would overwrite; leave it out"
            " and set r, which is redistributed within EvaConfig.rho"
        )
    eva = peft_config.eva_config or EvaConfig()
    require_known_variant(model, peft_config, adapter_name)
    target_layers = _target_layers(model, peft_config, adapter_name)
    if not target_layers:
        return {}
    _require_known_names(prepare_layer_inputs_fn, target_layers)
    tolerance = round(_ENERGY_SETTLING_LAST * (1 - eva.tau), 9)
    config = CalibrationConfig(
        rank=peft_config.r,
        rho=eva.rho,
        tolerance=tolerance,
        distributed=gather_distributed_inputs,
    )
    config = with_label_mask(config, eva)
    rows = _rows(model, peft_config, config, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    forward = None if forward_fn is forward_fn_dict else forward_fn
    device = model_device(model)
    batches = dataloader if forward is None else _moved(dataloader, device)
    with (
        ProcessGroup.create(config.distributed, device, config.rendezvous_timeout) as process_group,
        progress_callback("auto" if show_progress_bar else None, config) as progress,
    ):
        options = RunOptions(
            forward=forward, rows=rows, progress=progress, active=active_positions(peft_config)
        )
        try:
            calibration = run(model, target_layers, batches, config, process_group, options)
        except NoBatchError:
            raise NoBatchError(
                "the dataloader is empty: not one batch came; give a DataLoader, a list or a"
                " generator with data"
            ) from None
    calibration.require_usable()
    scale: Scale = "whiten" if eva.whiten else "paper"
    return {
        name: scaled_rows(calibration.spectra[name], rank, scale).to(device)
        for name, rank in calibration.allocate().ranks.items()
    }


@torch.inference_mode(mode=False)
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        LayerInputs | Mapping[str, LayerInputs] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Write EVA's directions, ranks and α into the adapter of a `PeftModel`, in place; B = 0.

    Works on adapters built with `low_cpu_mem_usage=True` too. With
    `EvaConfig.adjust_scaling_factors` (PEFT's default) each layer keeps its scale, whatever its new
    rank.

    Args:
        model: a `PeftModel` whose adapter has `init_lora_weights="eva"`.
        dataloader: batches, unless `eva_state_dict` is given.
        eva_state_dict: what `get_eva_state_dict`, ours or PEFT's, returned: name of a layer, with
            or without PEFT's prefix → (rank, in). No rows: the layer carries the adapter no more.
            Layers that are not in it keep rank and α, start as PEFT's default does, and are named
            in a warning. Nothing is taken out of the dict.

    All other arguments are as for `get_eva_state_dict`.

    Raises:
        AdapterError: no PeftModel, another `init_lora_weights`, B ≠ 0, or a state dict that does
            not fit.
        DataError: neither batches nor a state dict. All else as for `get_eva_state_dict`.

    The model is unchanged in every case.
    """
    if not hasattr(model, "peft_config"):
        raise AdapterError(
            "model must be a PeftModel; build one with get_peft_model(model, LoraConfig(...))"
        )
    lora = lora_config(model, adapter_name)
    if lora.init_lora_weights != "eva":
        raise AdapterError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`; that"
            f" of adapter {adapter_name!r} is {lora.init_lora_weights!r} (True also after it was"
            " initialized). evatune.initialize asks for nothing of the kind"
        )
    require_trainable(model)
    adapter = _linear_adapter(model, adapter_name)
    require_known_variant(model, lora, adapter_name)
    adapter.require_fresh()
    if eva_state_dict is None:
        if dataloader is None:
            raise DataError(
                "dataloader is required if eva_state_dict is not provided; give one of the two"
            )
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    rows = _fitting(eva_state_dict, adapter.targets)
    missing = [target for target in adapter.targets if target.name not in rows]
    for target in missing:
        shape = target.layer.r[adapter_name], target.target_layers[0].in_features
        rows[target.name] = default_rows(shape)
    for layer in adapter.others.values():  # they may be on the meta device
        reset_to_default_init(layer, adapter)
    write_rows(adapter, rows, lora.r)
    if missing or adapter.others:
        names = [*(target.name for target in missing), *adapter.others]
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were"
            f" not found in the eva state_dict: {', '.join(names)}",
            stacklevel=2,
        )


def _require_known_names(
    functions: LayerInputs | Mapping[str, LayerInputs] | None, target_layers: list[TargetLayer]
) -> None:
    """Raise a ConfigError for a mapping from names that no target layer has."""
    if not isinstance(functions, Mapping):
        return
    unknown = functions.keys() - {target_layer.name for target_layer in target_layers}
    if unknown:
        raise ConfigError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not"
            f" found in the model: {', '.join(sorted(unknown))}; the layers are named like"
            f" {target_layers[0].name}"
        )


def _linear_adapter(model: nn.Module, adapter_name: str) -> LoraAdapter:
    """Return the adapter with its linear layers, all that PEFT's EVA knows, as its targets."""
    adapter = LoraAdapter.find(model, adapter_name)
    linear = [target for target in adapter.targets if target.is_linear]
    others = {target.name: target.layer for target in adapter.targets if not target.is_linear}
    return replace(adapter, targets=linear, others=others | dict(adapter.others))


def _fitting(state: Mapping[str, Tensor], targets: list[LoraTarget]) -> dict[str, Tensor]:
    """Return the entries that belong to these layers, by the names that PEFT's patterns match."""
    by_name = {peft_name(key): value for key, value in state.items()}
    rows = {target.name: by_name[target.name] for target in targets if target.name in by_name}
    if state and targets and not rows:
        raise AdapterError(
            "no name in the eva state_dict is that of an adapted layer (names like"
            f" {next(iter(state))}; layers like {targets[0].name}); give the state dict of"
            " this model"
        )
    for target in targets:
        a, width = rows.get(target.name), target.target_layers[0].in_features
        if a is not None and (a.ndim != 2 or a.shape[1] != width):
            raise AdapterError(
                f"the eva state_dict has {tuple(a.shape)} for {target.name}; it must be (rank,"
                f" {width}); give the state dict of this model"
            )
    return rows


def _target_layers(model: nn.Module, config: LoraConfig, adapter_name: str) -> list[TargetLayer]:
    """Return the layers to calibrate, under their names in `model`.

    Unsupported kinds are left out, as PEFT does.
    """
    if hasattr(model, "peft_config"):
        targets = _linear_adapter(model, adapter_name).targets
        first = {target.path: target.target_layers[0] for target in targets}
        return [target_layer.renamed(path) for path, target_layer in first.items()]
    target_layers: list[TargetLayer] = []
    for name, module in _matched_modules(model, config).items():
        if is_linear(module):
            target_layers.extend(target_layers_of(name, module))
    return target_layers


def _matched_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the modules that the config's targets name; a TargetError if there is none."""
    modules = dict(model.named_modules())
    if config.target_modules is None or config.target_modules == "all-linear":
        linear = {target_layer.module for target_layer in find_target_layers(model, "all-linear")}
        config = copy.copy(config)
        config.target_modules = {name for name, module in modules.items() if module in linear}
    names = [name for name in modules if check_target_module_exists(config, name)]
    if not names:
        raise TargetError(
            f"target_modules {config.target_modules!r} match no layer of this model; try "
            "'all-linear', or a list of endings of layer names"
        )
    return {name: modules[name] for name in names}


def _rows(
    model: nn.Module,
    peft_config: LoraConfig,
    config: CalibrationConfig,
    prepare_model: ModelInputs | None,
    prepare_layer: LayerInputs | Mapping[str, LayerInputs] | None,
) -> RowsFunction | None:
    """Return the caller's functions as the engine's `rows`.

    None for PEFT's defaults, which the engine's own rule replaces.
    """
    is_default = prepare_model is prepare_model_inputs_fn_language_modeling
    if is_default and prepare_layer is prepare_layer_inputs_fn_language_modeling:
        return None
    select = selector_for(model, config.labels_only or False, config.ignore_index)

    def prepare(batch: Any) -> Any:
        if is_default:  # PEFT's takes nothing but a dict, and does not shift labels
            return _positions(select(batch), batch)
        return batch if prepare_model is None else prepare_model(batch, peft_config)

    model_input = _once_per_batch(prepare)

    def rows(x: Tensor, batch: Any, name: str) -> Tensor:
        chosen = prepare_layer.get(name) if isinstance(prepare_layer, Mapping) else prepare_layer
        return (
            x.reshape(-1, x.shape[-1]) if chosen is None else chosen((x,), model_input(batch), name)
        )

    return rows


def _positions(selector: RowSelector, batch: Any) -> Tensor | None:
    """Return (n, 2) row and column of each token that counts; None for a batch without tokens."""
    mask, ids = selector.mask, batch_field(batch, "input_ids")
    if mask is None and isinstance(ids, Tensor):
        mask = torch.ones_like(ids, dtype=torch.bool)
    return None if mask is None else mask.nonzero()


def _once_per_batch(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that remembers `make(batch)` until another batch comes.

    Every layer of a forward pass asks for it.
    """
    batch_seen, made = object(), None

    def get(batch: Any) -> Any:
        nonlocal batch_seen, made
        if batch is not batch_seen:
            batch_seen, made = batch, make(batch)
        return made

    return get


def _moved(batches: Iterable[Any], device: torch.device | None) -> Iterator[Any]:
    for batch in iterate(batches):
        yield to_device(batch, device)
