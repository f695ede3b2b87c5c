"""Rows that count: no padding, and with labels_only those that have a loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import evatune
from evatune.capture import RowSelector
from evatune.capture.row_selection import label_mask, token_mask
from evatune.errors import DataError
from tests.helpers import EXACT, Toy, inputs, second_moment, tiny_bert, tiny_llama, tokens

torch.set_num_threads(1)


def test_padding_is_left_out() -> None:
    seen: list[Tensor] = []
    model = tiny_bert()
    batches = tokens(padded=True)
    hook = model.encoder.layer[1].output.dense.register_forward_pre_hook(
        lambda m, a: seen.append(a[0].clone())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)])
    spectrum = evatune.calibrate(model, batches, EXACT).spectra["encoder.layer.1.output.dense"]
    assert spectrum.rows == len(rows)
    assert torch.allclose(spectrum.energies.double(), second_moment(rows)[:8], rtol=1e-4)


@pytest.mark.parametrize(
    "form", ["long", "bool", "float", "4d-bool", "4d-additive", "4d-causal", "3d", "query-free"]
)
def test_every_form_of_attention_mask_means_the_same(form: str) -> None:
    real = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    square = real[:, None, :].expand(2, 4, 4)
    mask = {
        "long": real.long(),
        "bool": real,
        "float": real.float(),
        "4d-bool": square[:, None],
        "4d-additive": torch.where(square, 0.0, torch.finfo(torch.float32).min)[:, None],
        "4d-causal": torch.where(square & torch.ones(4, 4).tril().bool(), 0.0, float("-inf"))[
            :, None
        ],
        "3d": square.long(),
        "query-free": real[:, None, None, :],
    }[form]
    found = token_mask(mask)
    assert found is not None
    assert torch.equal(found, real)


def test_an_additive_mask_that_masks_nothing_keeps_every_token() -> None:
    assert token_mask(torch.zeros(2, 1, 3, 3)).all()  # type: ignore[union-attr]


def test_labels_choose_the_positions_that_predict_them() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, 6]])
    assert label_mask(labels, -100, shift=False).tolist() == [
        [False, False, True, True],
        [False, True, False, True],
    ]
    assert label_mask(labels, -100, shift=True).tolist() == [
        [False, True, True, False],
        [True, False, True, False],
    ]


def test_labels_only_shifts_for_a_causal_model_and_not_for_an_encoder() -> None:
    config = evatune.CalibrationConfig(rank=2, sketch="exact", tolerance=0, labels_only=True)
    batches = []
    for batch in tokens(padded=True):
        labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        labels[:, :4] = -100
        batches.append({**batch, "labels": labels})
    shifted = evatune.calibrate(tiny_llama(), batches, config)
    wanted = sum(
        int((label_mask(b["labels"], -100, True) & b["attention_mask"].bool()).sum())
        for b in batches
    )
    assert {s.rows for s in shifted.spectra.values()} == {wanted}
    plain = evatune.calibrate(
        tiny_bert(),
        batches,
        config,
        forward=lambda m, b: m(b["input_ids"], b["attention_mask"]),
        targets=["intermediate.dense"],
    )
    assert next(iter(plain.spectra.values())).rows == sum(
        int((b["labels"] != -100).sum()) for b in batches
    )


def test_labels_only_without_token_labels_says_so() -> None:
    batches = [{"x": x, "labels": torch.zeros(4)} for x in inputs()]
    with pytest.raises(DataError, match=r"labels_only needs token labels.*\(4,\)"):
        evatune.calibrate(Toy(), batches, evatune.CalibrationConfig(labels_only=True))


def test_pooled_rows_and_flattened_rows_follow_their_shape() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    selector = RowSelector(mask.bool())
    assert selector.rows(torch.zeros(2, 3, 5))[1].tolist() == [0, 1, 3]  # type: ignore[union-attr]
    assert selector.rows(torch.zeros(6, 5))[1].tolist() == [0, 1, 3]  # type: ignore[union-attr]
    assert selector.rows(torch.zeros(2, 5))[1] is None
    assert selector.rows(torch.zeros(2, 3, 2, 5))[1].tolist() == [0, 1, 2, 3, 6, 7]  # type: ignore[union-attr]
    assert selector.rows(torch.zeros(2, 7, 5))[1] is None
