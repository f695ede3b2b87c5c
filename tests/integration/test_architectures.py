"""Real architectures, tiny and with random weights: calibrate, initialize, train a step, save, load
with plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune.errors import LayerError, TargetError
from tests.architectures import SMALL, bart, seeded, t5
from tests.helpers import TEXT, round_trip, tiny_bert, tiny_llama, tokens

torch.set_num_threads(1)


pytestmark = [
    # PEFT looks for the patterns of parameters among modules only when it warns; it does honour
    # them.
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
    ),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **TEXT, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    return seeded(transformers.MixtralForCausalLM, config)


def qwen_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **TEXT,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
    )
    return seeded(transformers.Qwen3MoeForCausalLM, config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **TEXT, num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return seeded(transformers.GptOssForCausalLM, config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return seeded(transformers.GPT2LMHeadModel, config)


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        mlp_ratio=2,
    )
    return seeded(transformers.Dinov2ForImageClassification, config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="bottleneck",
        num_labels=5,
    )
    return seeded(transformers.ResNetForImageClassification, config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4, num_labels=5
    )
    return seeded(transformers.ConvNextForImageClassification, config)


def decision_transformer() -> nn.Module:
    config = transformers.DecisionTransformerConfig(
        state_dim=5, act_dim=3, hidden_size=16, n_layer=2, n_head=2, n_positions=64, max_ep_len=20
    )
    return seeded(transformers.DecisionTransformerModel, config)


def pairs_of_texts() -> list[dict[str, Tensor]]:
    """Sources and, of another length, targets."""
    return [
        source
        | {
            "decoder_input_ids": target["input_ids"][:, :9],
            "decoder_attention_mask": target["attention_mask"][:, :9],
        }
        for source, target in zip(
            tokens(8, padded=True), tokens(8, seed=1, padded=True), strict=True
        )
    ]


def pictures() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(4, 3, 28, 28, generator=generator).cumsum(-1) / 4}
        for _ in range(6)
    ]


def trajectories() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "states": torch.randn(4, 6, 5, generator=generator),
            "actions": torch.randn(4, 6, 3, generator=generator),
            "rewards": torch.randn(4, 6, 1, generator=generator),
            "returns_to_go": torch.rand(4, 6, 1, generator=generator),
            "timesteps": torch.randint(0, 20, (4, 6), generator=generator),
            "attention_mask": torch.ones(4, 6),
        }
        for _ in range(6)
    ]


def padded() -> list[dict[str, Tensor]]:
    return tokens(8, padded=True)


# name → model, batches, adapter
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], dict[str, Any]]] = {
    "llama": (tiny_llama, padded, {"target_modules": "all-linear"}),
    "llama, embeddings too": (
        tiny_llama,
        padded,
        {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    ),
    "mixtral": (
        mixtral,
        padded,
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS},
    ),
    "qwen3-moe": (qwen_moe, padded, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "qwen3-moe, router": (
        qwen_moe,
        padded,
        {"target_modules": [], "target_parameters": ["mlp.gate.weight", *EXPERTS]},
    ),
    "gpt-oss": (gpt_oss, padded, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "gpt2": (gpt2, padded, {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"]}),
    "bert": (
        tiny_bert,
        padded,
        {"target_modules": ["query", "value", "dense", "word_embeddings", "token_type_embeddings"]},
    ),
    "t5": (t5, pairs_of_texts, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}),
    "bart": (bart, pairs_of_texts, {"target_modules": ["q_proj", "k_proj", "v_proj", "fc1"]}),
    "dinov2": (
        dinov2,
        pictures,
        {"target_modules": ["projection", "q_proj", "v_proj", "fc1", "fc2"]},
    ),
    "resnet": (resnet, pictures, {"target_modules": ["convolution", "classifier.1"]}),
    "convnext": (
        convnext,
        pictures,
        {"target_modules": ["patch_embeddings", "downsampling_layer.1", "pwconv1", "pwconv2"]},
    ),
    "decision transformer": (
        decision_transformer,
        trajectories,
        {"target_modules": ["c_attn", "c_fc", "embed_state", "embed_timestep"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_architecture_through_plain_peft(case: str, tmp_path: Path) -> None:
    build, batches, options = CASES[case]
    data = batches()
    calibration, start = round_trip(build, LoraConfig(r=2, lora_alpha=4, **options), data, tmp_path)
    assert all(status.usable for status in calibration.status.values())
    ranks = calibration.allocate().ranks
    assert sum(ranks.values()) <= 2 * len(ranks)
    for name, a in start.items():
        if name in ranks and "conv" not in name:
            assert torch.equal(a, calibration.spectra[name].directions[: len(a)].view_as(a))


def test_an_embedding_that_is_not_called_with_ids_is_refused_by_name() -> None:
    model = get_peft_model(bart(), LoraConfig(target_modules=["q_proj", "embed_positions"]))
    with pytest.raises(
        TargetError,
        match=r"embed_positions is an embedding \(Bart.*\) that is called with torch.float32",
    ):
        evatune.initialize(model, pairs_of_texts())


def test_a_tower_that_no_batch_reaches_is_named_with_advice_that_works() -> None:
    text = {"vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=SMALL | text,
        vision_config=SMALL | {"image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    images = [{"pixel_values": torch.randn(4, 3, 28, 28)} for _ in range(4)]
    for left_out in (None, r"text_model\..*"):
        lora = LoraConfig(r=4, target_modules=["q_proj", "fc1"], exclude_modules=left_out)
        model = get_peft_model(transformers.CLIPModel(config), lora)
        forward = lambda model, batch: model.get_image_features(**batch)  # noqa: E731
        if left_out is None:
            with pytest.raises(
                LayerError, match=r"2 of 4 .*never_called: text_model.*exclude_modules"
            ):
                evatune.initialize(model, images, forward=forward)
        else:
            found = evatune.initialize(model, images, forward=forward)
            assert all(name.startswith("vision_model.") for name in found.spectra)
