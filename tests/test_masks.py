"""Masks follow the rows where two sequences meet; a layer with several calls or names has all of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import evatune
from tests.test_architectures import bart, bert, seeded, t5

torch.set_num_threads(1)
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
        "input_ids": source, "attention_mask": source_mask, "decoder_input_ids": target,
        "decoder_attention_mask": target_mask, "labels": labels,
    }  # fmt: skip


def bert_to_bert() -> nn.Module:
    encoder, decoder = bert().config, bert().config.__class__(**bert().config.to_dict())
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
    assert len({layer.input for layer in calibration.layers.values()}) == 1  # keys and values of all blocks share it


def test_labels_only_speaks_about_the_decoder() -> None:
    batch = two_sequences()
    batch["labels"][:, :3] = -100
    config = evatune.CalibrationConfig(components=4, sketch="exact", tolerance=0, labels_only=True)
    spectra = evatune.calibrate(t5(), [batch], config, targets=r".*\.(wi|k)").spectra
    asked = int((batch["labels"] != -100).sum())
    assert spectra["decoder.block.1.layer.2.DenseReluDense.wi"].rows == asked
    assert spectra["encoder.block.1.layer.1.DenseReluDense.wi"].rows == int(batch["attention_mask"].sum())
    assert spectra["decoder.block.1.layer.1.EncDecAttention.k"].rows == int(batch["attention_mask"].sum())


# -- one module under several names, or called several times ------------------------------------------


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
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32, tie_word_embeddings=True),
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    batch = {key: two_sequences()[key] for key in ("input_ids", "attention_mask")}
    spectra = evatune.calibrate(model, [batch], EXACT, targets=["lm_head", "wte"]).spectra
    assert spectra["lm_head"].directions.shape == (4, 16)
    assert spectra["transformer.wte"].directions.shape == (4, 60)
    assert spectra["lm_head"].rows == spectra["transformer.wte"].rows == int(batch["attention_mask"].sum())
