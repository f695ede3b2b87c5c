"""Reads a saved LoRA adapter without its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from evatune.errors import RecordError

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."
# Of embeddings, A and B are parameters and not layers.
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


def is_adapter(file: Path) -> bool:
    """Whether this is a safetensors file with LoRA matrices in it."""
    try:
        with safe_open(file, framework="pt") as opened:
            return any(key.endswith(tuple(_PAIRS)) for key in opened.keys())  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError):
        return False


def adapter_rows(weights: Path) -> list[dict[str, Any]]:
    """Per layer of an `adapter_model.safetensors`: rank, alpha, scale, parameters and norms.

    Raises RecordError for a damaged file, a damaged or absent config beside it, or an adapter that is not LoRA.
    """
    config = read_config(weights.parent)
    try:
        rows = _rows(weights, config)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise RecordError(
            f"{str(weights)!r} is damaged or not a LoRA adapter ({type(error).__name__}: {error}); save the adapter again"
        ) from error
    if not rows:
        raise RecordError(f"{str(weights)!r} holds no LoRA matrices; give a file that PEFT's save_pretrained wrote")
    return rows


def read_config(folder: Path) -> LoraConfig:
    """The config of a saved LoRA adapter; a RecordError for a folder without one, or with one of another kind."""
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    if not path.is_file():
        raise RecordError(f"{str(path)!r} does not exist, which says what the adapter's scale is; put it beside the weights")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
        config = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise RecordError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}); save the adapter again, or put its config back"
        ) from error
    if config is None:
        raise RecordError(f"{str(folder)!r} holds an adapter of type {kind!r}; only LoRA is read")
    return config


def layer_scale(config: LoraConfig, layer: str, rank: int) -> tuple[float, float]:
    """(α, scale) of a layer, by its name without PEFT's prefix and the rank of its matrices."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), layer), config.lora_alpha)
    return alpha, alpha / (rank**0.5 if config.use_rslora else rank)


def _rows(weights: Path, config: LoraConfig) -> list[dict[str, Any]]:
    rows = []
    with safe_open(weights, framework="pt") as file:
        found = [(key, end) for key in file.keys() for end in _PAIRS if key.endswith(end)]  # noqa: SIM118  not a mapping
        heights = {key.removeprefix(_PREFIX): file.get_slice(key).get_shape()[0] for key, _ in found}
        for key, end in found:
            path = key.removeprefix(_PREFIX).removesuffix(end)
            a, b = file.get_tensor(key).float(), file.get_tensor(key.removesuffix(end) + _PAIRS[end]).float()
            # Attention's output projection, or one of several stacked weights, hangs in the wrapper of its layer.
            unit = path.partition(".base_layer")[0]
            beside = [
                height for other, height in heights.items() if other.startswith((unit + ".lora_", unit + ".base_layer"))
            ]
            name, rank = _stacked(config, unit, path.count(".base_layer"), len(a), sum(beside)) or (unit, len(a))
            alpha, scale = layer_scale(config, name, rank)
            rows.append(
                {
                    "layer": path.replace(".base_layer", "") if name == unit else name,
                    "rank": rank,
                    "alpha": alpha,
                    "scale": scale,
                    "parameters": a.numel() + b.numel(),
                    "a_row_norm": float(a.flatten(1).norm(dim=1).mean()),
                    "b_norm": float(b.norm()),
                }
            )
    return rows


def _stacked(config: LoraConfig, unit: str, depth: int, height: int, together: int) -> tuple[str, int] | None:
    """Name and rank of an adapted parameter of the module `unit`, of whose experts A has the rows one after another.

    The file does not say how many experts there are: the ranks in the config do, since all parameters of a module have
    equally many. None for other layers.

    Args:
        depth: how many wrappers are around this one; evatune lists the parameters of a module in this order.
        height: rows of this A. together: of all A of the module.
    """
    from peft.utils.other import get_pattern_key

    ends = [target.rpartition(".") for target in config.target_parameters or ()]
    here = [key for module, _, key in ends if not module or f".{unit}".endswith(f".{module}")]
    names = [f"{unit}.{key}" for key in here]
    pattern = config.rank_pattern
    ranks = {name: int(pattern.get(get_pattern_key(pattern.keys(), name), config.r)) for name in names}
    experts = max(1, together // sum(ranks.values())) if ranks else 1
    likely = names[depth:] + names[:depth]
    return next(((name, ranks[name]) for name in likely if ranks[name] * experts == height), None)
