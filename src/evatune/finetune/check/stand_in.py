"""Small models with random weights that have the features of a large one.

A model's own configuration is shrunk: two layers, narrow, with few heads. What makes it the
architecture that it is stays: how many heads share keys, kinds of layers in turn, soft-capping,
gates, disentangled attention, patches, and the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from evatune.errors import DataError
from evatune.utils.text import first_line

_LAYERS, _HEADS, _HEAD_WIDTH, _EXPERTS = 2, 2, 16, 4
_STAGE_SHARE = 8  # by which stages of growing width become narrower
_LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "num_encoder_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers", "n_layer", "n_layers"),
)
_WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"),
    *("pooler_hidden_size", "embedding_size"),
)
_INNER_WIDTHS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"),
    *("hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
_HEAD_COUNTS = (
    *("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("n_head", "n_heads"),
)
_EXPERT_COUNTS = {"num_local_experts": _EXPERTS, "num_experts": _EXPERTS, "num_experts_per_tok": 2}
# Factors by frequency, whose number is that of a head's width.
_BY_FREQUENCY = ("long_factor", "short_factor", "mrope_section")
# Derived from the number of layers or the width, and again so by the smaller ones.
_DERIVED = (
    *("stage_names", "out_features", "out_indices", "sliding_window_pattern"),
    *("quantization_config", "max_window_layers"),
)

_Tree = dict[str, Any]


def shrunk(config: Any) -> Any:
    """Return a small configuration with the features of a model's.

    Nothing of it is larger than it was.
    """
    return type(config).from_dict(_shrunk(config))


def write_stand_in(source: str | Path, loader: str, folder: Path, trust: bool) -> None:
    """Write a small model with random weights, of the class that a checkpoint is of.

    Args:
        source: hub id or folder of the checkpoint, of which the configuration is read.
        loader: transformers' auto class for a checkpoint that does not say its class.
        trust: run Python code that comes with the model.

    Raises DataError for an architecture that cannot be made smaller in this way.
    """
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes that nobody chose
            torch.manual_seed(0)
            _built(shrunk(config), loader, trust).save_pretrained(folder)
    except Exception as error:  # whatever a model's class says of sizes that do not fit each other
        raise DataError(
            f"no small stand-in of {str(source)!r} can be built ({config.model_type}:"
            f" {first_line(error)}); run a few steps of the recipe itself with training.steps=2"
        ) from error


def _built(config: Any, loader: str, trust: bool) -> Any:
    """Return a model with random weights, of the class that its configuration names."""
    named = (config.architectures or [""])[0]
    if named and hasattr(transformers, named):
        return getattr(transformers, named)._from_config(config)
    return getattr(transformers, loader).from_config(config, trust_remote_code=trust)


def _shrunk(config: Any) -> _Tree:
    tree: _Tree = config.to_dict()
    names = getattr(config, "attribute_map", {})
    inner = [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)]
    if isinstance(tree.get("depths"), list):
        changed = _with_short_stages(tree)
    else:
        changed = _with_few_layers(tree, config) | _narrow(tree, config)
    changed |= {
        key: min(most, tree[key])
        for key, most in _EXPERT_COUNTS.items()
        if isinstance(tree.get(key), int)
    }
    changed |= {name: _shrunk(getattr(config, name)) for name in inner}
    kept = {key: value for key, value in tree.items() if key not in _DERIVED}
    return kept | {names.get(key, key): value for key, value in changed.items()}


def _with_few_layers(tree: Mapping[str, Any], config: Any) -> _Tree:
    """Return the settings of a model's first layers, one of each kind where there are several."""
    total = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None) or []
    chosen = sorted({kinds.index(kind) for kind in kinds})[:_LAYERS]
    chosen += [index for index in range(total or 0) if index not in chosen]
    chosen = sorted(chosen[:_LAYERS])
    counts = {
        key: min(_LAYERS, tree[key]) for key in _LAYER_COUNTS if isinstance(tree.get(key), int)
    }
    if total is None or total <= _LAYERS:
        return counts
    lists = {key: value for key, value in tree.items() if isinstance(value, list)}
    per_layer = {
        key: [value[index] for index in chosen]
        for key, value in lists.items()
        if len(value) == total
    }
    return counts | per_layer


def _narrow(tree: Mapping[str, Any], config: Any) -> _Tree:
    """Return the settings of a narrow model: as many query heads per key head, or two heads."""
    width, heads = getattr(config, "hidden_size", None), _number_of_heads(tree)
    if not isinstance(width, int) or heads is None:
        return {}
    keys = tree.get("num_key_value_heads")
    keys = keys if isinstance(keys, int) and keys else heads
    few_keys = min(_HEADS, keys)
    few_heads = heads // keys * few_keys
    frequencies = [*_values(tree, "rope_scaling"), *_values(tree, "rope_parameters")]
    fixed = any(key in _BY_FREQUENCY for key in frequencies) or "qk_rope_head_dim" in tree
    usual = tree.get("head_dim") or width // heads
    head_width = usual if fixed else min(usual, _HEAD_WIDTH)
    narrow = min(width, few_heads * head_width)
    return {
        **{key: narrow for key in _WIDTHS if tree.get(key) == width},
        **{key: min(2 * narrow, tree[key]) for key in _INNER_WIDTHS if tree.get(key)},
        **{key: few_heads for key in _HEAD_COUNTS if isinstance(tree.get(key), int)},
        **({"num_key_value_heads": few_keys} if tree.get("num_key_value_heads") else {}),
        **{key: head_width for key in ("head_dim", "attention_head_size") if tree.get(key)},
        **({"mlp_ratio": min(2, tree["mlp_ratio"])} if tree.get("mlp_ratio") else {}),
    }


def _number_of_heads(tree: Mapping[str, Any]) -> int | None:
    return next((tree[key] for key in _HEAD_COUNTS if isinstance(tree.get(key), int)), None)


def _values(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, Mapping) else {}


def _with_short_stages(tree: Mapping[str, Any]) -> _Tree:
    """Return the settings of stages of one layer each, an eighth as wide or eight a head."""
    changed: _Tree = {"depths": [1] * len(tree["depths"])}
    widths, heads = tree.get("hidden_sizes"), tree.get("num_heads")
    if isinstance(widths, list):
        changed["hidden_sizes"] = [max(8, width // _STAGE_SHARE) for width in widths]
    if isinstance(heads, list) and isinstance(tree.get("embed_dim"), int):
        width = min(tree["embed_dim"], 8 * heads[0])
        changed |= {"embed_dim": width, "hidden_size": width * 2 ** (len(heads) - 1)}
    return changed
