"""Small models with the features of large ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evatune.errors import DataError
from evatune.finetune.check import stand_in
from evatune.finetune.check.stand_in import shrunk, write_stand_in

LLAMA = transformers.LlamaConfig(
    vocab_size=500,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
GEMMA = transformers.Gemma2Config(
    vocab_size=500, hidden_size=3584, num_hidden_layers=42, num_attention_heads=16
)
DEBERTA = transformers.DebertaV2Config(
    vocab_size=500,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    relative_attention=True,
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
    position_biased_input=False,
    type_vocab_size=0,
    pooler_hidden_size=768,
)
DINOV2 = transformers.Dinov2Config(
    hidden_size=1536,
    num_hidden_layers=40,
    num_attention_heads=24,
    use_swiglu_ffn=True,
    image_size=56,
    patch_size=14,
)
LONG = transformers.Phi3Config(
    vocab_size=500,
    pad_token_id=0,
    eos_token_id=1,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 48,
        "long_factor": [2.0] * 48,
        "factor": 32.0,
    },
)
EXPERTS = transformers.Qwen3MoeConfig(vocab_size=500)
LATENT = transformers.DeepseekV3Config(vocab_size=500)


def ran(config: Any) -> Any:
    """The shrunk configuration, of which a model gives an output."""
    small = shrunk(config)
    if hasattr(config, "image_size"):
        model = transformers.AutoModel.from_config(small)
        output = model(pixel_values=torch.zeros(1, 3, config.image_size, config.image_size))
    else:
        model = transformers.AutoModel.from_config(small)
        output = model(input_ids=torch.arange(2, 8)[None])
    assert torch.isfinite(output.last_hidden_state).all()
    assert sum(p.numel() for p in model.parameters()) < 8e6
    return small


def test_heads_share_keys_as_before_and_the_vocabulary_stays() -> None:
    small = ran(LLAMA)
    assert small.num_attention_heads // small.num_key_value_heads == 4
    assert (small.num_hidden_layers, small.vocab_size, small.hidden_size) == (2, 500, 128)
    assert LLAMA.num_hidden_layers == 32


def test_kinds_of_layers_and_soft_capping_stay() -> None:
    small = ran(GEMMA)
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert small.attn_logit_softcapping == GEMMA.attn_logit_softcapping
    assert small.final_logit_softcapping == GEMMA.final_logit_softcapping


def test_attention_stays_disentangled_and_gates_stay() -> None:
    assert ran(DEBERTA).pos_att_type == ["p2c", "c2p"]
    small = ran(DINOV2)
    assert (small.use_swiglu_ffn, small.patch_size, small.num_hidden_layers) == (True, 14, 2)


@pytest.mark.parametrize("config", [LONG, EXPERTS, LATENT], ids=["long", "experts", "latent"])
def test_other_architectures_run_too(config: Any) -> None:
    ran(config)


def test_stages_keep_their_number() -> None:
    swin = shrunk(transformers.SwinConfig())
    assert (swin.depths, swin.num_heads, swin.embed_dim) == ([1] * 4, [3, 6, 12, 24], 24)
    pixels = torch.zeros(1, 3, 224, 224)
    assert transformers.SwinModel(swin)(pixel_values=pixels).last_hidden_state.shape[-1] == 192
    conv = shrunk(transformers.ConvNextConfig())
    assert conv.hidden_sizes == [12, 24, 48, 96]
    assert transformers.ConvNextModel(conv)(pixel_values=pixels).pooler_output.shape == (1, 96)


def test_nested_configurations_are_shrunk_within() -> None:
    small = shrunk(transformers.Gemma3Config())
    assert small.text_config.num_hidden_layers == 2
    assert small.vision_config.num_hidden_layers == 2


def test_what_is_small_already_grows_nowhere() -> None:
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    small = shrunk(config)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(small, key) <= getattr(config, key)


def test_a_stand_in_is_of_the_class_of_its_checkpoint(tmp_path: Path) -> None:
    for classes in (None, "LlamaForSequenceClassification"):
        LLAMA.architectures = classes and [classes]
        LLAMA.save_pretrained(tmp_path / "large")
        write_stand_in(tmp_path / "large", "AutoModelForCausalLM", tmp_path / "small", False)
        written = transformers.AutoConfig.from_pretrained(tmp_path / "small").architectures
        assert written == [classes or "LlamaForCausalLM"]
    LLAMA.architectures = None


def test_an_architecture_that_cannot_be_made_smaller_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    monkeypatch.setattr(stand_in, "_narrow", lambda *_: {"hidden_size": 10})
    with pytest.raises(DataError, match=r"no small stand-in of .* \(bert: .*training\.steps=2"):
        write_stand_in(tmp_path, "AutoModel", tmp_path / "small", False)
