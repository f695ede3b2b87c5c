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
_A, _B = ".lora_A.weight", ".lora_B.weight"


def is_adapter(file: Path) -> bool:
    """Whether this is a safetensors file with LoRA matrices in it."""
    try:
        with safe_open(file, framework="pt") as opened:
            return any(key.endswith(_A) for key in opened.keys())  # noqa: SIM118  not a mapping
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
        for key in file.keys():  # noqa: SIM118  not a mapping
            if not key.endswith(_A):
                continue
            layer = key.removeprefix(_PREFIX).removesuffix(_A)
            a, b = file.get_tensor(key).float(), file.get_tensor(key.removesuffix(_A) + _B).float()
            rank = a.shape[0]
            alpha, scale = layer_scale(config, layer, rank)
            rows.append(
                {
                    "layer": layer,
                    "rank": rank,
                    "alpha": alpha,
                    "scale": scale,
                    "parameters": a.numel() + b.numel(),
                    "a_row_norm": float(a.flatten(1).norm(dim=1).mean()),
                    "b_norm": float(b.norm()),
                }
            )
    return rows
