"""Small models with planted answers, and a tiny real architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Query, key and value share an input; the output projection has its own."""

    def __init__(self, d: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)
        return x + self.down(torch.relu(self.up(x)))


class Toy(nn.Module):
    """Two blocks. Takes (B, T, d) or keywords, like a model of a library."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.dropout = nn.Dropout(0.5)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        for block in self.blocks:
            x = self.dropout(block(x))
        return x


def inputs(count: int = 6, rows: int = 64, d: int = 16, seed: int = 0) -> list[Tensor]:
    """Batches (4, rows / 4, d) whose directions differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.8 ** torch.arange(d)
    return [
        (torch.randn(4, rows // 4, d, generator=generator) * scales + 0.3) for _ in range(count)
    ]


def tiny_bert(kind: str = "base", **options: Any) -> Any:
    """A BERT of two small layers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        **options,
    )
    return {
        "base": transformers.BertModel,
        "classification": transformers.BertForSequenceClassification,
    }[kind](config).eval()


def tiny_llama() -> Any:
    """A Llama of two small layers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(count: int = 4, seed: int = 0, padded: bool = False) -> list[dict[str, Tensor]]:
    """Batches of (4, 12) token ids; with `padded`, two rows end early."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 60, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, 7:] = 0
            mask[2, 3:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
