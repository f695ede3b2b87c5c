"""Models that several modules of runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import save_model


@pytest.fixture(scope="session")
def steady_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without dropout, whose masks would differ between halves of a batch."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return save_model(transformers.BertModel(config), tmp_path_factory.mktemp("steady") / "bert")
