"""Which positions have a loss: the model is asked, and not its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import evatune
from evatune.capture.labels import LabelShift, declares_shift
from evatune.modeling.forward import call_model
from tests.architectures import llava, seeded
from tests.helpers import TEXT, state_of, tiny_bert, tiny_llama

torch.set_num_threads(1)


def xlnet() -> nn.Module:
    return seeded(
        transformers.XLNetLMHeadModel,
        transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=32),
    )


def bart_decoder() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=60, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32
    )
    return seeded(transformers.BartForCausalLM, config)


def masked_bert() -> nn.Module:
    return seeded(transformers.BertForMaskedLM, transformers.BertConfig(**TEXT))


def tagger() -> nn.Module:
    return seeded(
        transformers.BertForTokenClassification, transformers.BertConfig(**TEXT, num_labels=60)
    )


def answers(images: bool = False) -> dict[str, Tensor]:
    """The last four of twelve tokens have labels."""
    ids = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        ids[:, 1:5] = 59
        batch["pixel_values"] = torch.randn(
            3, 3, 16, 16, generator=torch.Generator().manual_seed(1)
        )
    return batch | {"labels": ids.clone().index_fill_(1, torch.arange(8), -100)}


# model → a layer behind which positions mix no more, and the first of the four positions that have
# a loss
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "Llava": (llava, "model.language_model.layers.0.mlp.down_proj", 7),
    "Llama": (tiny_llama, "model.layers.1.mlp.down_proj", 7),
    "XLNet": (xlnet, "lm_loss", 8),
    "Bart's decoder": (bart_decoder, "model.decoder.layers.0.fc2", 8),
    "masked language model": (masked_bert, "bert.encoder.layer.1.output.dense", 8),
    "token classification": (tagger, "bert.encoder.layer.1.output.dense", 8),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_rows_with_a_loss_are_those_that_the_models_loss_depends_on(case: str) -> None:
    build, layer, first = MODELS[case]
    model, batch = build(), answers(images=case == "Llava")
    config = evatune.CalibrationConfig(rank=2, labels_only=True)

    def by_hand(activation: Tensor, given: Any, name: str) -> Tensor:
        return activation[:, first : first + 4].flatten(0, 1)

    found = evatune.calibrate(model, [batch], config, targets=[layer]).spectra[layer]
    wanted = evatune.calibrate(model, [batch], config, targets=[layer], rows=by_hand).spectra[layer]
    assert found.rows == wanted.rows == 12
    assert found.total_second_moment == pytest.approx(wanted.total_second_moment, rel=1e-9)


def test_labels_say_nothing_about_the_patches_of_images() -> None:
    config = evatune.CalibrationConfig(rank=2, labels_only=True)
    batch = answers(images=True)
    batch = {
        key: value[:, :5] if value.shape[1:] == (12,) else value for key, value in batch.items()
    }
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :3] = -100
    # five rows for each image, as the text has tokens
    name = "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert evatune.calibrate(llava(), [batch], config, targets=[name]).spectra[name].rows == 15


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_asking_leaves_everything_as_it_was(context: Callable[[], Any]) -> None:
    model, other = bart_decoder().requires_grad_(False).train(), tiny_llama()
    before = state_of(model), state_of(other), torch.random.get_rng_state()
    with context():
        batch = answers()
        assert not LabelShift(model, -100, call_model).of(batch)
        assert LabelShift(other, -100, call_model).of(batch)
    assert declares_shift(model)  # as its name says, which is not so
    assert (state_of(model), state_of(other)) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_a_model_that_cannot_be_asked_is_taken_at_its_word() -> None:
    def fails(model: nn.Module, batch: Any) -> Any:
        raise RuntimeError("out of memory")

    for model, shifts in (
        (tiny_llama(), True),
        (llava(), True),
        (tagger(), False),
        (tiny_bert(), False),
    ):
        for run in (None, fails):
            assert LabelShift(model, -100, run).of(answers()) is shifts
