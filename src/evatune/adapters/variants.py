"""Variants of LoRA: those that EVA may start, and the reasons why others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn

from evatune.capture.row_selection import batch_field
from evatune.errors import AdapterError, DataError
from evatune.modeling.wrappers import peft_name

# Starts of PEFT's that leave the base weights, and the forward pass, as they are.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")

# PEFT's classes of variants that were run with ranks that change, in
# tests/adapters/test_config_fields.py; of those that are no classes, rsLoRA and `lora_bias`.
_KNOWN = {
    "DoraLinearVariant",
    "DoraEmbeddingVariant",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "VeloraLinearVariant",  # another backward pass through A, whose input is the layer's
    "MontecloraLinearVariant",  # noise on A while training, of A's shape
    "ALoraLinearVariant",  # acts on some positions only, see `active_positions`
}

# Option of LoraConfig → why A cannot start from directions of the layer's input, at its own rank.
_REFUSED = {
    "kasa_config": (
        "KaSA takes singular values off the base weights whenever a rank is set, and "
        "has a diagonal between A and B"
    ),
    "use_qalora": "the A of QA-LoRA sees group means of the layer's input, and not the input",
    "use_bdlora": "the A or B of BD-LoRA is block-diagonal, with ranks in multiples of the blocks",
    "arrow_config": "Arrow routes between other adapters, and has no A of its own to train",
}


def require_known_variant(model: nn.Module, lora: LoraConfig, adapter_name: str) -> None:
    """Raise an AdapterError unless the adapter is plain LoRA or a variant that is known to fit EVA.

    Args:
        model: a model with the adapter, or one that `lora` is meant for.
    """
    start = lora.init_lora_weights
    if start == "mica":
        raise AdapterError(
            f"adapter {adapter_name!r} is MiCA (init_lora_weights='mica'), which freezes B at "
            "directions of the weights and trains A from 0, where EVA sets A and trains B from 0; "
            "use init_lora_weights=True or 'eva'"
        )
    if start not in PLAIN_STARTS:
        raise AdapterError(
            f"adapter {adapter_name!r} was started by init_lora_weights={start!r}, which changes "
            "the base weights; load the base model again, with a LoraConfig that says "
            "init_lora_weights=True or 'eva'"
        )
    for option, reason in _REFUSED.items():
        if getattr(lora, option, None):
            raise AdapterError(
                f"adapter {adapter_name!r} has {option} set, which EVA cannot start: {reason}; "
                "leave it out of the LoraConfig, or train the adapter without evatune"
            )
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_variant:
            continue
        variant = type(layer.lora_variant[adapter_name]).__name__
        if variant not in _KNOWN:
            raise AdapterError(
                f"adapter {adapter_name!r} is of a variant of LoRA that evatune does not know "
                f"({variant}, for example at {peft_name(path)}); use plain LoRA or a variant known "
                "to fit, such as DoRA, or train the adapter without evatune"
            )


def active_positions(lora: LoraConfig) -> Callable[[Any], Tensor] | None:
    """Return a function from a batch to the (B, T) positions where the adapter acts; None: all.

    Activated LoRA acts from the last occurrence of its invocation tokens on.
    """
    invocation = lora.alora_invocation_tokens
    if not invocation:
        return None

    def positions(batch: Any) -> Tensor:
        ids = batch_field(batch, "input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise DataError(
                "the adapter acts from its alora_invocation_tokens on, and the batch has no"
                " input_ids of shape (batch, tokens) to find them in; give batches with input_ids,"
                " or choose rows yourself with rows="
            )
        # Counted from the end; None where the tokens do not occur.
        offsets = calculate_alora_offsets({"": lora}, "", ids)
        counts = ids.new_tensor([offset or 0 for offset in offsets])
        positions = torch.arange(ids.shape[1], dtype=ids.dtype, device=ids.device)
        return positions >= ids.shape[1] - counts[:, None]

    return positions
