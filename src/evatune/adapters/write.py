"""Write matrices, ranks and α into the LoRA layers of a `PeftModel`, in place."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from evatune.adapters.lora_layers import (
    LoraTarget,
    matrices_of,
    pairs,
    tied_layers,
)
from evatune.modeling.forward import model_device
from evatune.modeling.wrappers import (
    peft_names,
)


def _update(
    layer: LoraLayer, rank: int, alpha: float, config: LoraConfig, adapter_name: str
) -> None:
    """PEFT's new parameters for a layer, where its weights are, whatever torch's default device
    is."""
    with model_device(layer.get_base_layer()) or torch.device("cpu"):
        layer.update_layer(adapter_name, r=rank, lora_alpha=alpha, config=config)


@torch.no_grad()
def write_rows(
    model: nn.Module,
    lora: LoraConfig,
    lora_targets: list[LoraTarget],
    # site → its rows of A, (rank, in); no rows: the layer carries the adapter no more
    rows: Mapping[str, Tensor],
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
    ranks = {
        lora_target.name: len(rows[lora_target.target_layers[0].name])
        for lora_target in lora_targets
    }
    layers = {
        lora_target.name: lora_target.layer
        for lora_target in lora_targets
        if ranks[lora_target.name]
    }
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
        for lora_target in lora_targets:
            name = lora_target.name
            if ranks[name]:
                matrices = matrices_of(lora_target, rows)
                _fill(lora_target.layer, matrices, ranks[name], alphas[name], fresh, adapter_name)
            else:
                _remove(model, lora_target, adapter_name, lora.bias)
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
    """α at `rank` such that the scale, α/r or under rsLoRA α/√r, is what `alpha` gave at the rank
    `before`."""
    ratio = rank / before
    adjusted = alpha * (ratio**0.5 if rslora else ratio)
    return int(adjusted) if adjusted == int(adjusted) else adjusted


def _fill(
    layer: LoraLayer,
    matrices: list[Tensor],
    rank: int,
    alpha: float,
    config: LoraConfig,
    adapter_name: str,
) -> None:
    """Give the layer its rank, α and A; B = 0. Parameters keep their dtype, and their identity
    where they fit."""
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
    # PEFT's update_layer makes every adapter of the layer trainable, and a magnitude vector of the
    # base's dtype.
    before = {name: p.requires_grad for name, p in layer.named_parameters()}
    # A trained magnitude vector of DoRA starts anew as well.
    anew = adapter_name in layer.lora_magnitude_vector
    if anew or layer.r[adapter_name] != rank or any(a.device.type == "meta" for a, _, _ in old):
        _update(layer, rank, alpha, config, adapter_name)
        for parameter in (p for pair in pairs(layer, adapter_name) for p in pair if p is not None):
            # get_peft_model may have chosen float32 above a 16-bit base
            parameter.data = parameter.data.to(dtype)
        if adapter_name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[adapter_name].to(dtype)
        for name, parameter in layer.named_parameters():
            if name in before:
                parameter.requires_grad_(before[name])
    else:
        # attention's output projection goes along
        for part in (layer, getattr(layer.base_layer, "out_proj", None)):
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

        sharded: Any = parameter
        value = value.to(parameter.device)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    parameter.copy_(value)


def _remove(model: nn.Module, lora_target: LoraTarget, adapter_name: str, bias: str) -> None:
    """Take the adapter off a layer, and the wrapper with it unless another adapter needs it.

    Args:
        bias: which biases the adapter trains, as `LoraConfig` says it.
    """
    layer = lora_target.layer
    if set(layer.r) == {adapter_name}:
        # Looked up, for a wrapper around this one may be gone.
        path = next(path for path, module in model.named_modules() if module is layer)
        parent, _, child = path.rpartition(".")
        plain = layer.get_base_layer()
        if isinstance(layer, MultiheadAttention):
            plain = layer.unload_and_optionally_merge_module(
                merge=False, safe_merge=False, adapter_names=None
            )
        elif lora_target.is_parameter:
            plain = layer.base_layer  # another parameter of the module may have a wrapper too
        setattr(model.get_submodule(parent), child, plain)
        if bias == "lora_only" and getattr(plain, "bias", None) is not None:
            plain.bias.requires_grad_(False)  # PEFT would not save it
        return
    with _kept(layer):
        layer.delete_adapter(adapter_name)


@contextmanager
def _kept(layer: LoraLayer) -> Iterator[None]:
    """PEFT activates another adapter on a layer that loses its active one; here every other stays
    as it was."""
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

    PEFT takes the first key that a layer's name ends in. So longer names come first, and a layer
    with the default value needs an entry where another's name would match it.
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
