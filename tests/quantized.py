"""Small models of quantized linear layers that run on a CPU, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 32, bias=False))


def torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes(kind: str, **options: Any) -> nn.Module:
    layers = pytest.importorskip("bitsandbytes", exc_type=ImportError).nn
    model = plain()
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        quantized = getattr(layers, kind)(
            layer.in_features, layer.out_features, bias=False, **options
        )
        quantized.load_state_dict(layer.state_dict())
        # else its weight is packed for inference at the first call
        quantized.support_avx512bf16_for_cpu = False
        setattr(model, name, quantized.to("cpu"))
    setattr(model, "is_loaded_in_8bit" if kind == "Linear8bitLt" else "is_loaded_in_4bit", True)
    return model


QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "torchao, 8 bits": torchao,
    "bitsandbytes, 8 bits": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes, 4 bits": lambda: bitsandbytes("Linear4bit", compute_dtype=torch.float32),
}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(50, 64, generator=generator) * 0.9 ** torch.arange(64) for _ in range(4)]
