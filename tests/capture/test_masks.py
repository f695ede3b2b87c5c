"""Masks follow the rows where two sequences meet; a layer with several calls or names has all of
its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from tests.architectures import bart, llava, seeded, t5
from tests.helpers import TEXT, tiny_bert

torch.set_num_threads(1)


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

EXACT = evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0)


def two_sequences() -> dict[str, Tensor]:
    """Sources and targets of equal lengths, with other padding."""
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(3, 60, (2, 4, 12), generator=generator)
    source_mask, target_mask = torch.ones(2, 4, 12, dtype=torch.long)
    source_mask[0, 7:] = source_mask[3, 2:] = 0
    target_mask[1, 5:] = 0
    labels = target.masked_fill(target_mask == 0, -100)
    return {
        "input_ids": source,
        "attention_mask": source_mask,
        "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
        "labels": labels,
    }


def bert_to_bert() -> nn.Module:
    encoder, decoder = (
        tiny_bert().config,
        tiny_bert().config.__class__(**tiny_bert().config.to_dict()),
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return seeded(transformers.EncoderDecoderModel, config)


# model → layers of the encoder, of the decoder, and of the decoder but fed by the encoder
TWO_SIDES: dict[str, tuple[Any, str, str, str]] = {
    "t5": (
        t5,
        r"encoder\.block\..*\.(q|wi|wo)",
        r"decoder\..*(SelfAttention\.k|EncDecAttention\.(q|o)|wi)",
        r".*EncDecAttention\.(k|v)",
    ),
    "bart": (
        bart,
        r"model\.encoder\..*(q_proj|fc2)",
        r"model\.decoder\..*(self_attn\.k_proj|encoder_attn\.(q_proj|out_proj)|fc1)",
        r".*encoder_attn\.(k|v)_proj",
    ),
    "bert to bert": (
        bert_to_bert,
        r"encoder\..*(query|output\.dense)",
        r"decoder\..*\.(attention\.self\.key|crossattention\.self\.query)",
        r"decoder\..*crossattention\.self\.(key|value)",
    ),
}


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces")
@pytest.mark.parametrize("case", TWO_SIDES)
@pytest.mark.parametrize("given", ["mask", "labels", "nothing"])
def test_each_side_of_an_encoder_decoder_goes_by_its_own_mask(case: str, given: str) -> None:
    build, encoder, decoder, across = TWO_SIDES[case]
    batch = two_sequences()
    source, target = int(batch["attention_mask"].sum()), int(batch["decoder_attention_mask"].sum())
    if given != "mask":
        del batch["decoder_attention_mask"]
    if given == "nothing":
        del batch["labels"]
        target = 48
    model = build()
    for pattern, rows in ((encoder, source), (decoder, target), (across, source)):
        calibration = evatune.calibrate(model, [batch] * 2, EXACT, targets=pattern)
        assert {spectrum.rows for spectrum in calibration.spectra.values()} == {2 * rows}


def test_the_rows_of_cross_attention_are_the_encoders() -> None:
    batch, model, seen = two_sequences(), bart(), []
    layer = model.model.decoder.layers[1].encoder_attn.k_proj
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    rows = seen[0][batch["attention_mask"].bool()].double()
    name = "model.decoder.layers.1.encoder_attn.k_proj"
    calibration = evatune.calibrate(model, [batch], EXACT, targets=r".*encoder_attn\.(k|v)_proj")
    wanted = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)[:4]
    assert torch.allclose(calibration.spectra[name].energies.double(), wanted, rtol=1e-4)
    # keys and values of all blocks share it
    assert len({layer.input for layer in calibration.layers.values()}) == 1


def test_labels_only_speaks_about_the_decoder() -> None:
    batch = two_sequences()
    batch["labels"][:, :3] = -100
    config = evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0, labels_only=True)
    spectra = evatune.calibrate(t5(), [batch], config, targets=r".*\.(wi|k)").spectra
    asked = int((batch["labels"] != -100).sum())
    assert spectra["decoder.block.1.layer.2.DenseReluDense.wi"].rows == asked
    assert spectra["encoder.block.1.layer.1.DenseReluDense.wi"].rows == int(
        batch["attention_mask"].sum()
    )
    assert spectra["decoder.block.1.layer.1.EncDecAttention.k"].rows == int(
        batch["attention_mask"].sum()
    )


class Looped(nn.Module):
    """One block applied three times, and a second name for one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = self.block

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + torch.tanh(self.block(x))
        return self.out(torch.tanh(self.tied(x)))


def test_a_module_has_the_rows_of_all_its_calls_under_its_first_name() -> None:
    model, seen = Looped(), []
    xs = list(torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0)))
    model.block.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    calibration = evatune.calibrate(model, xs, EXACT)
    assert list(calibration.spectra) == ["block", "out"]
    rows = torch.cat(seen).double()
    assert calibration.spectra["block"].rows == len(rows) == 3 * 3 * 20
    wanted = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)[:4]
    assert torch.allclose(calibration.spectra["block"].energies.double(), wanted, rtol=1e-4)
    assert all(status.usable for status in calibration.status.values())


def test_layers_that_share_a_weight_have_rows_of_their_own() -> None:
    model = seeded(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32, tie_word_embeddings=True
        ),
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    batch = {key: two_sequences()[key] for key in ("input_ids", "attention_mask")}
    spectra = evatune.calibrate(model, [batch], EXACT, targets=["lm_head", "wte"]).spectra
    assert spectra["lm_head"].directions.shape == (4, 16)
    assert spectra["transformer.wte"].directions.shape == (4, 60)
    assert (
        spectra["lm_head"].rows
        == spectra["transformer.wte"].rows
        == int(batch["attention_mask"].sum())
    )


def speech(kind: str) -> tuple[nn.Module, dict[str, Tensor], int]:
    """A model of sounds, two of which are one third as long as the batch, and how many frames those
    have."""
    sound = torch.zeros(2, 6000)
    sound[:, :2000] = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    heard = (torch.arange(6000) < 2000).long().expand(2, 6000)
    sizes = {
        **TEXT,
        "num_hidden_layers": 1,
        "conv_dim": (16, 16),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 8),
    }
    config = {"wav2vec2": transformers.Wav2Vec2Config, "hubert": transformers.HubertConfig}[kind]
    build = {"wav2vec2": transformers.Wav2Vec2Model, "hubert": transformers.HubertModel}[kind]
    model = seeded(
        build, config(**sizes, num_feat_extract_layers=2, num_conv_pos_embedding_groups=2)
    )
    frames = model._get_feat_extract_output_lengths(torch.tensor(2000))  # type: ignore[operator]
    return model, {"input_values": sound, "attention_mask": heard}, 2 * int(frames)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_frames_go_by_the_mask_that_the_encoder_is_called_with(kind: str) -> None:
    model, batch, frames = speech(kind)
    for targets in (["q_proj"], ["output_dense"]):
        (spectrum,) = evatune.calibrate(model, [batch], EXACT, targets=targets).spectra.values()
        assert spectrum.rows == frames


def test_layers_that_no_mask_fits_are_named_once_and_count_in_full() -> None:
    model, batch, _ = speech("wav2vec2")
    with pytest.warns(
        UserWarning, match=r"these layers, .*: feature_projection\.projection; .* rows="
    ) as caught:
        calibration = evatune.calibrate(model, [batch] * 3, EXACT, targets="all-linear")
    assert len(caught) == 1
    assert calibration.spectra["feature_projection.projection"].rows == 3 * 2 * 298


def padded_tokens(*shape: int, real: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(shape[-1]) < real).long().expand(shape),
    }


def test_choices_are_masked_like_sequences_of_their_own() -> None:
    model = seeded(transformers.BertForMultipleChoice, tiny_bert().config)
    spectra = evatune.calibrate(
        model, [padded_tokens(2, 2, 12)], EXACT, targets=["query", "classifier"]
    ).spectra
    assert {spectrum.rows for name, spectrum in spectra.items() if name.endswith("query")} == {
        2 * 2 * 5
    }
    assert spectra["classifier"].rows == 4  # pooled, which is nothing to warn about
    double = seeded(
        transformers.GPT2DoubleHeadsModel,
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2),
    )
    (spectrum,) = evatune.calibrate(
        double, [padded_tokens(2, 3, 12)], EXACT, targets=["c_attn"]
    ).spectra.values()
    assert spectrum.rows == 2 * 3 * 5


def test_what_is_padded_to_a_window_has_the_windows_mask() -> None:
    config = transformers.LongformerConfig(**TEXT, attention_window=[8, 8], pad_token_id=1)
    model = seeded(transformers.LongformerModel, config)
    for batch in (padded_tokens(4, 12), padded_tokens(4, 12, real=12)):
        spectra = evatune.calibrate(model, [batch], EXACT, targets=["intermediate.dense"]).spectra
        assert {spectrum.rows for spectrum in spectra.values()} == {
            int(batch["attention_mask"].sum())
        }


def test_sequences_with_time_first_are_masked_too() -> None:
    config = transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=32)
    (spectrum,) = evatune.calibrate(
        seeded(transformers.XLNetModel, config), [padded_tokens(4, 12)], EXACT, targets=["layer_1"]
    ).spectra.values()
    assert spectrum.rows == 4 * 5


class Towers(nn.Module):
    """Images and texts, in plain modules; each with as many rows as the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.text = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
        self.projector = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor, pictures: Tensor, attention_mask: Tensor) -> Tensor:
        seen = self.projector(self.vision(pictures).flatten(1, 2)[:, :6])
        return self.text(x) + seen


@dataclass
class TextAndPictures:
    x: Tensor
    pictures: Tensor
    attention_mask: Tensor


@pytest.mark.parametrize("kind", [dict, TextAndPictures])
def test_the_mask_of_a_text_does_not_cut_images(kind: type) -> None:
    batch = {
        "x": torch.randn(3, 6, 8),
        "pictures": torch.randn(3, 2, 3, 8),
        "attention_mask": torch.ones(3, 6),
    }
    batch["attention_mask"][:, 4:] = 0
    rows = {
        name: spectrum.rows
        for name, spectrum in evatune.calibrate(Towers(), [kind(**batch)], EXACT).spectra.items()
    }
    assert rows == {"vision.0": 18, "vision.1": 18, "projector.0": 18, "text.0": 12, "text.1": 12}


def clip() -> nn.Module:
    text, vision = (
        transformers.CLIPTextConfig(**TEXT),
        transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
    )
    return seeded(
        transformers.CLIPModel, transformers.CLIPConfig(text_config=text, vision_config=vision)
    )


def blip() -> nn.Module:
    config = transformers.BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 16, "projection_dim": 16, "pad_token_id": 0},
        vision_config={**SIZES, "image_size": 16, "patch_size": 8},
    )
    return seeded(transformers.BlipForConditionalGeneration, config)


# model → a layer of its vision tower, and one of its text's
VISION: dict[str, tuple[Any, str, str]] = {
    "clip": (clip, "vision_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
    "blip": (
        blip,
        "vision_model.encoder.layers.0.mlp.fc1",
        "text_decoder.bert.encoder.layer.0.intermediate.dense",
    ),
    "llava": (
        llava,
        "model.vision_tower.encoder.layers.0.mlp.fc1",
        "model.language_model.layers.0.mlp.up_proj",
    ),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("case", VISION)
def test_the_tower_of_a_vision_language_model_has_all_its_rows(case: str, adapted: bool) -> None:
    build, vision, text = VISION[case]
    # an image has five rows, too
    batch = padded_tokens(3, 5, real=4) | {"pixel_values": torch.randn(3, 3, 16, 16)}
    batch["input_ids"] = (
        batch["input_ids"].fill_(59) if case == "llava" else batch["input_ids"] % 59
    )
    if case == "llava":
        batch["input_ids"][:, 4] = 3
    model = get_peft_model(build(), LoraConfig(target_modules="all-linear")) if adapted else build()
    spectra = evatune.calibrate(model, [batch], EXACT, targets="all-linear").spectra
    assert spectra[vision].rows == 3 * 5
    assert spectra[text].rows == 3 * 4


class Inner(nn.Module):
    """Hands a mask of its own to a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Inner(), Inner(), nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        fewer = attention_mask.clone()
        fewer[:, 1:] = 0
        return self.third(x) + self.second(self.first(x, fewer))


def test_the_nearest_mask_decides_also_where_layers_have_one_input() -> None:
    batch = {"x": torch.randn(2, 6, 8), "attention_mask": padded_tokens(2, 6)["attention_mask"]}
    called = evatune.calibrate(Nested(), [batch] * 2, EXACT).spectra
    handed = evatune.calibrate(  # a mask that reaches the model under no name of the batch's
        Nested(), [tuple(batch.values())] * 2, EXACT, forward=lambda model, given: model(*given)
    ).spectra
    for spectra in (called, handed):
        assert {name: s.rows for name, s in spectra.items()} == {
            "first.layer": 4,
            "second.layer": 20,
            "third": 20,
        }


def test_the_output_embedding_of_an_encoder_decoder_has_the_decoders_rows() -> None:
    batch = two_sequences()
    (spectrum,) = evatune.calibrate(bart(), [batch], EXACT, targets=["lm_head"]).spectra.values()
    assert spectrum.rows == int(batch["decoder_attention_mask"].sum())
