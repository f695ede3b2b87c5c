"""Write matrices, ranks and α into the LoRA layers of a `PeftModel`, in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from evatune.adapters.adapter import LoraAdapter
from evatune.adapters.lora_layers import LoraTarget, lora_matrix_pairs, matrices_of
from evatune.adapters.patterns import pattern_of, set_targets, targets_for
from evatune.modeling.forward import model_device
from evatune.modeling.state import cuda_devices
from evatune.modeling.wrappers import peft_names
from evatune.scaling import lora_scale, scale_divisor


@dataclass(frozen=True)
class RankAndAlpha:
    """The rank and the α of a layer."""

    rank: int
    alpha: float


@torch.no_grad()
def write_rows(adapter: LoraAdapter, rows: Mapping[str, Tensor], rank: int) -> None:
    """Give each layer A, rank, B = 0 and α, and the adapter a config with ranks, α and targets.

    That config is the adapter's alone: the one it was built from may be that of other models and
    adapters too, and stays as it is. Layers in `adapter.others` stay as they are.

    The order: ranks, α and the new config are worked out before anything is written. Then each
    layer is resized (`_resize`, where the old parameters take over what PEFT makes) and filled, or
    loses the adapter. Tied layers follow, which share the matrices that the embedding has by then.
    The config comes last.

    Args:
        adapter: what to write into.
        rows: target layer → its rows of A, (rank, in); no rows: it carries the adapter no more.
        rank: the r that the config gets, and that the scale of every layer refers to.
    """
    ranks = {target.name: len(rows[target.target_layers[0].name]) for target in adapter.targets}
    remaining = {target.name: target.layer for target in adapter.targets if ranks[target.name]}
    tied = adapter.tied
    if tied:
        embedding = adapter.model.get_input_embeddings()  # type: ignore[operator]
        carriers = remaining | dict(adapter.others)
        name = next(name for name, layer in carriers.items() if layer is embedding)
        ranks |= dict.fromkeys(tied, ranks.get(name, embedding.r[adapter.name]))
    new = {
        name: RankAndAlpha(ranks[name], _new_alpha(layer, adapter, ranks[name], rank))
        for name, layer in (remaining | tied).items()
    }
    config = _new_config(adapter, new, rank, remaining.keys() | adapter.others.keys())

    plain_config = copy.copy(adapter.config)
    plain_config.init_lora_weights = True  # with BA = 0; not every kind of layer knows "eva"
    plain = replace(adapter, config=plain_config)
    # PEFT draws an A that is overwritten at once.
    with torch.random.fork_rng(devices=cuda_devices(adapter.model)):
        for target in adapter.targets:
            if ranks[target.name]:
                _fill(target.layer, matrices_of(target, rows), new[target.name], plain)
            else:
                _remove(adapter, target)
        for name, layer in tied.items():
            _tie(layer, embedding, new[name], plain)
    adapter.model.peft_config[adapter.name] = config  # type: ignore[index, operator]


def reset_to_default_init(layer: LoraLayer, adapter: LoraAdapter) -> None:
    """Have PEFT initialize a layer as it does by default."""
    plain_config = copy.copy(adapter.config)
    plain_config.init_lora_weights = True
    now = RankAndAlpha(layer.r[adapter.name], layer.lora_alpha[adapter.name])
    _update(layer, now, plain_config, adapter.name)


def _new_config(
    adapter: LoraAdapter,
    new: Mapping[str, RankAndAlpha],
    rank: int,
    carriers: set[str],
) -> LoraConfig:
    """Return a copy of the config that says these ranks and α, and names the layers `carriers`.

    It says too that no layer is left to initialize.
    """
    ranks = {name: layer.r[adapter.name] for name, layer in adapter.others.items()}
    ranks |= {name: value.rank for name, value in new.items()}
    alphas = {name: layer.lora_alpha[adapter.name] for name, layer in adapter.others.items()}
    alphas |= {name: value.alpha for name, value in new.items()}
    config = copy.deepcopy(adapter.config)
    config.r = rank
    config.rank_pattern = pattern_of(ranks, rank)
    config.alpha_pattern = pattern_of(alphas, adapter.config.lora_alpha)
    # Axolotl and others refuse to merge an adapter that still says "eva".
    config.init_lora_weights, config.eva_config = True, None

    layers = {target.name: target.layer for target in adapter.targets} | dict(adapter.others)
    wrappers = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    parameters = [name for name in wrappers if name in carriers]
    tied = adapter.tied.keys()
    names = peft_names(adapter.model) - tied
    set_targets(config, names, carriers - tied - set(parameters))
    if config.target_parameters:
        dropped = layers.keys() - adapter.others.keys() - carriers
        config.target_parameters = targets_for(config.target_parameters, parameters, dropped)
    return config


def _new_alpha(layer: LoraLayer, adapter: LoraAdapter, new_rank: int, rank: int) -> float:
    """Return the α of a layer of rank `new_rank`, in an adapter whose config will say `rank`."""
    lora = adapter.config
    now: float = layer.lora_alpha[adapter.name]
    if lora.eva_config is not None and not lora.eva_config.adjust_scaling_factors:
        return now
    # First back to what it would be at the config's rank: an earlier call may have moved both.
    at_config_rank = _alpha(now, lora.r, layer.r[adapter.name], lora.use_rslora)
    return _alpha(at_config_rank, new_rank, rank, lora.use_rslora)


def _alpha(alpha: float, rank: int, before: int, rslora: bool) -> float:
    """Return the α that gives at `rank` the scale that `alpha` gave at the rank `before`."""
    adjusted = alpha * scale_divisor(rank / before, rslora)
    return int(adjusted) if adjusted == int(adjusted) else adjusted


def _update(layer: LoraLayer, new: RankAndAlpha, config: LoraConfig, adapter_name: str) -> None:
    """Have PEFT make new parameters for a layer, where its weights are.

    Torch's default device does not matter.
    """
    with model_device(layer.get_base_layer()) or torch.device("cpu"):
        layer.update_layer(adapter_name, r=new.rank, lora_alpha=new.alpha, config=config)


def _fill(
    layer: LoraLayer, matrices: list[Tensor], new: RankAndAlpha, adapter: LoraAdapter
) -> None:
    """Give the layer its rank, α and A; B = 0."""
    _resize(layer, new, adapter)
    for (a, b, bias), matrix in zip(lora_matrix_pairs(layer, adapter.name), matrices, strict=True):
        _put(a, matrix)
        b.zero_()
        if bias is not None:
            bias.zero_()


def _resize(layer: LoraLayer, new: RankAndAlpha, adapter: LoraAdapter) -> None:
    """Give the layer its rank and α; A and B are to be filled.

    Parameters keep their dtype, and their identity where they fit.
    """
    old = lora_matrix_pairs(layer, adapter.name)
    # A trained magnitude vector of DoRA starts anew as well.
    has_magnitude = adapter.name in layer.lora_magnitude_vector
    is_missing = any(a.device.type == "meta" for a, _, _ in old)
    if has_magnitude or is_missing or layer.r[adapter.name] != new.rank:
        _replace_parameters(layer, new, adapter, old[0][0].dtype)
        return
    scaling = lora_scale(new.alpha, new.rank, adapter.config.use_rslora)
    # attention's output projection goes along
    for carrier in (layer, getattr(layer.base_layer, "out_proj", None)):
        if isinstance(carrier, LoraLayer):
            carrier.lora_alpha[adapter.name] = new.alpha
            carrier.scaling[adapter.name] = scaling


def _replace_parameters(
    layer: LoraLayer, new: RankAndAlpha, adapter: LoraAdapter, dtype: torch.dtype
) -> None:
    """Resize the layer's parameters, as `dtype`; each stays trainable or frozen as it was.

    They remain the same objects, so that an optimizer which holds them keeps training them.
    """
    # PEFT's update_layer makes new ones, makes those of every adapter of the layer trainable, a
    # magnitude vector of the base's dtype, and its modules as in training.
    before = dict(layer.named_parameters())
    trainable = {name: parameter.requires_grad for name, parameter in before.items()}
    training = {name: module.training for name, module in layer.named_modules()}
    _update(layer, new, adapter.config, adapter.name)
    for pair in lora_matrix_pairs(layer, adapter.name):
        for parameter in pair:
            if parameter is not None:
                # get_peft_model may have chosen float32 above a 16-bit base
                parameter.data = parameter.data.to(dtype)
    if adapter.name in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[adapter.name].to(dtype)
    for name, parameter in list(layer.named_parameters()):
        if name in before:
            kept = _keep(layer, name, before[name], parameter)
            kept.requires_grad_(trainable[name])
    for name, module in layer.named_modules():
        module.training = training.get(name, layer.training)


def _keep(layer: LoraLayer, name: str, old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    """Put the old parameter back, with the values of the new one, and return it.

    If the old one is on the meta device, which holds no values, the new one stays.
    """
    if old is new or old.device.type == "meta":
        return new
    old.data, old.grad = new.data, None
    path, _, key = name.rpartition(".")
    setattr(layer.get_submodule(path), key, old)
    return old


def _tie(layer: LoraLayer, embedding: LoraLayer, new: RankAndAlpha, adapter: LoraAdapter) -> None:
    """Give a tied layer rank and α, and as A and B the transposes of the embedding's B and A."""
    trainable = layer.lora_A[adapter.name].weight.requires_grad
    _resize(layer, new, adapter)
    a, b, _ = lora_matrix_pairs(embedding, adapter.name)[0]
    for linear, source in ((layer.lora_A[adapter.name], b), (layer.lora_B[adapter.name], a)):
        if linear.weight.data_ptr() != source.data_ptr():
            linear.weight = nn.Parameter(source.t(), trainable)


def _put(parameter: Tensor, value: Tensor) -> None:
    """Copy `value` into a parameter, or this process's part of it into the shard that is here."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = value.to(parameter.device)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    parameter.copy_(value)


def _remove(adapter: LoraAdapter, target: LoraTarget) -> None:
    """Take the adapter off a layer, and the wrapper with it unless another adapter needs it."""
    layer = target.layer
    bias = getattr(layer.get_base_layer(), "bias", None)
    if adapter.config.bias == "lora_only" and bias is not None:
        bias.requires_grad_(False)  # PEFT would not save it
    if set(layer.r) != {adapter.name}:
        with _other_adapters_kept(layer):
            layer.delete_adapter(adapter.name)
        return
    # Looked up, for a wrapper around this one may be gone.
    path = next(path for path, module in adapter.model.named_modules() if module is layer)
    parent, _, child = path.rpartition(".")
    plain = layer.get_base_layer()
    if isinstance(layer, MultiheadAttention):
        plain = layer.unload_and_optionally_merge_module(
            merge=False, safe_merge=False, adapter_names=None
        )
    elif target.is_parameter:
        plain = layer.base_layer  # another parameter of the module may have a wrapper too
    setattr(adapter.model.get_submodule(parent), child, plain)


@contextmanager
def _other_adapters_kept(layer: LoraLayer) -> Iterator[None]:
    """Keep the active adapters and what is trainable, while the layer loses an adapter.

    PEFT activates another one on a layer that loses its active one.
    """
    active = list(layer.active_adapters)
    trainable = {name: p.requires_grad for name, p in layer.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it activates another adapter, which is undone below
        yield
    layer._active_adapter = active
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trainable[name])
