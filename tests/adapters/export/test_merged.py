"""The base model with an adapter added into its weights, where layers share weights too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from evatune.adapters.export.merged import write_merged
from evatune.errors import AdapterError
from tests.adapters.helpers import merge_adapter
from tests.helpers import (
    output,
    perturbed_adapter,
    tiny_bert,
    tiny_llama,
    tokens,
)

torch.set_num_threads(1)


def tied_llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            tie_word_embeddings=True,
        )
    ).eval()


def tied_bart() -> Any:
    torch.manual_seed(0)
    sizes = {
        f"{part}_{key}": n
        for part in ("encoder", "decoder")
        for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = transformers.BartConfig(vocab_size=60, d_model=16, max_position_embeddings=40, **sizes)
    return transformers.BartForConditionalGeneration(config).eval()


def tied_t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tied_bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(tiny_bert().config).eval()


def probe(model: Any) -> dict[str, Tensor]:
    ids = tokens(1)[0]["input_ids"]
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    )


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word",
    "ignore:Model with `tie_word",
    "ignore:Setting `save_embedding_layers`",
)
@pytest.mark.parametrize(
    ("build", "options", "tied"),
    [
        (tied_llama, {"target_modules": ["q_proj"]}, True),
        (tied_llama, {"target_modules": ["q_proj", "embed_tokens"]}, False),
        (tied_llama, {"target_modules": ["lm_head"]}, False),
        (tied_llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        (tied_llama, {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 3)]}, True),
        (tied_bart, {"target_modules": ["decoder.embed_tokens"]}, False),
        (tied_bart, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        # a T5 says that it is tied, and goes by its weights
        (tied_t5, {"target_modules": ["lm_head"]}, None),
        (tied_bert, {"target_modules": ["word_embeddings"]}, False),
        (lambda: tied_llama().to(torch.bfloat16), {"target_modules": ["embed_tokens"]}, False),
    ],
)
def test_weights_that_layers_share_come_apart_where_the_adapter_belongs_to_one(
    tmp_path: Path, build: Any, options: dict[str, Any], tied: bool | None
) -> None:
    model = perturbed_adapter(build(), **options)
    batch = probe(model)
    expected = output(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert write_merged(build(), tmp_path / "adapter", tmp_path / "merged", batch) is None
    again = type(build()).from_pretrained(tmp_path / "merged", dtype="auto")
    tolerance = 1e-6 if again.dtype == torch.float32 else 1e-2
    assert float((output(again, batch) - expected).norm() / expected.norm()) < tolerance
    assert float((output(build(), batch) - expected).norm() / expected.norm()) > 5e-3
    assert tied in (None, again.config.tie_word_embeddings)


def test_one_layer_under_two_names_is_merged_under_the_adapters_name_only(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        model.append(model[0])
        return model

    model = perturbed_adapter(build(), target_modules=["0"])
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert torch.allclose(merge_adapter(build(), tmp_path)(x), model(x), atol=1e-6)


def test_a_model_that_does_not_run_on_tokens_is_written_and_said_to_be_unchecked(
    tmp_path: Path,
) -> None:
    model = perturbed_adapter(tied_bart(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    why = write_merged(
        tied_bart(), tmp_path / "adapter", tmp_path / "merged", {"pixel_values": torch.ones(1, 3)}
    )
    assert "does not run on tokens alone" in str(why)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_quantized_base_is_not_merged_into(tmp_path: Path) -> None:
    perturbed_adapter(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    base = tiny_llama()
    base.is_quantized = True
    with pytest.raises(AdapterError, match=r"quantized.*--model"):
        merge_adapter(base, tmp_path)
