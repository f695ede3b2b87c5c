"""Real architectures, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn


def seeded(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config)
    return model.eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return seeded(transformers.T5ForConditionalGeneration, config)


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
    )
    return seeded(transformers.BartForConditionalGeneration, config)


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**SMALL, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**SMALL, vocab_size=60)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=59)
    return seeded(transformers.LlavaForConditionalGeneration, config)
