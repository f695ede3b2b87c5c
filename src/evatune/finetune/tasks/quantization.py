"""Weights of 4 bits below an adapter."""

from __future__ import annotations

from typing import Any

import accelerate
import transformers
from torch import nn

from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.base import DTYPES
from evatune.modeling.state import PACKS_4_BITS
from evatune.utils.extras import require

# Names of heads, and of what checkpoints may lack besides. They are trained or in the loss.
_UNQUANTIZED = ["lm_head", "classifier", "score", "pooler"]


def quantized(recipe: Recipe) -> dict[str, Any]:
    """Return what `from_pretrained` needs beside its usual options for the base that is wanted.

    As in QLoRA: NormalFloat of 4 bits, its scales quantized again, products in the run's precision.

    Raises MissingExtraError where bitsandbytes is needed and missing.
    """
    if recipe.adapter.quantize == "none":
        return {}
    require("quantized", "adapter.quantize")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.adapter.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[recipe.training.precision],
        llm_int8_skip_modules=_UNQUANTIZED,
    )
    return {"quantization_config": config, "device_map": {"": accelerate.PartialState().device}}


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights of 4 bits anew in an evaluation, on a CPU with AVX512.

    What is packed lets no gradient through to the layers below, and layers narrower than a block
    of weights cannot be packed at all.
    """
    for module in model.modules():
        if PACKS_4_BITS in module.__dict__:
            setattr(module, PACKS_4_BITS, False)
