"""Reads a saved LoRA adapter without its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evatune.errors import RecordError

_PREFIX = "base_model.model."


def adapter_rows(weights: Path) -> list[dict[str, Any]]:
    """Per layer of an `adapter_model.safetensors`: rank, alpha, scale, parameters and norms.

    Raises RecordError for a damaged file, a damaged config beside it, or an adapter that is not LoRA.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    try:
        with (weights.parent / "adapter_config.json").open(encoding="utf-8") as file:
            raw = json.load(file)
        if raw.get("peft_type") != "LORA":
            raise RecordError(f"{weights.parent} holds an adapter of type {raw.get('peft_type')!r}; only LoRA is read")
        config = LoraConfig.from_pretrained(str(weights.parent))
        with safe_open(weights, framework="pt") as file:
            keys = {key.removeprefix(_PREFIX): key for key in file.keys()}  # noqa: SIM118  not a mapping
            rows = []
            for short, key in keys.items():
                layer, found, _ = short.partition(".lora_A.weight")
                if not found:
                    continue
                a = file.get_tensor(key).float()
                b = file.get_tensor(keys[f"{layer}.lora_B.weight"]).float()
                alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), layer), config.lora_alpha)
                rank = a.shape[0]
                rows.append(
                    {
                        "layer": layer,
                        "rank": rank,
                        "alpha": alpha,
                        "scale": alpha / (rank**0.5 if config.use_rslora else rank),
                        "parameters": a.numel() + b.numel(),
                        "a_row_norm": float(a.flatten(1).norm(dim=1).mean()),
                        "b_norm": float(b.norm()),
                    }
                )
            return rows
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{weights} is damaged or not a LoRA adapter ({type(error).__name__}: {error})") from error
