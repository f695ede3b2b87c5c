"""Inputs are recorded in the passes of the calibration alone, and as rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

import evatune
from evatune.errors import DataError
from tests.helpers import EXACT, Toy, inputs, second_moment, tiny_bert, tiny_llama, tokens

torch.set_num_threads(1)


def test_forward_and_rows_replace_the_defaults() -> None:
    xs = inputs()
    asked: set[str] = set()

    def rows(activation: Tensor, batch: Any, name: str) -> Tensor:
        asked.add(name)
        return (
            activation[:, 0] if name.endswith("q") else activation.reshape(-1, activation.shape[-1])
        )

    found = evatune.calibrate(
        Toy(),
        [{"image": x} for x in xs],
        EXACT,
        forward=lambda m, b: m(b["image"]),
        rows=rows,
        targets=["q", "k"],
    )
    assert asked == {"blocks.0.q", "blocks.0.k", "blocks.1.q", "blocks.1.k"}
    assert found.spectra["blocks.0.q"].rows == 4 * len(xs)
    assert found.spectra["blocks.0.k"].rows == 64 * len(xs)
    assert torch.allclose(
        found.spectra["blocks.0.q"].energies.double(),
        second_moment(torch.cat(xs)[:, 0])[:8],
        rtol=1e-4,
    )


def test_rows_of_a_wrong_shape_name_the_layer() -> None:
    with pytest.raises(DataError, match=r"'blocks.0.q'\) returned shape \(4, 16, 16\)"):
        evatune.calibrate(Toy(), inputs(), rows=lambda activation, batch, name: activation)


def test_rows_are_handed_the_kind_of_batch_that_was_given() -> None:
    batch = BatchEncoding(tokens(1)[0])
    kinds: list[type] = []

    def rows(x: Tensor, given: Any, name: str) -> Tensor:
        kinds.append(type(given))
        return x[given.attention_mask.bool()] if x.ndim == 3 else x

    evatune.calibrate(tiny_bert(), [batch] * 2, EXACT, rows=rows)
    assert set(kinds) == {BatchEncoding}


def test_a_pass_of_others_between_two_of_ours_does_not_end_early() -> None:
    model, ends = tiny_llama(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: ends.append(len(args[0])))

    def stream() -> Iterator[dict[str, Tensor]]:
        for batch in tokens(5):
            model(batch["input_ids"][:2])
            yield batch

    evatune.calibrate(model, stream(), EXACT)
    assert ends == [2, 4, 2, 2, 2, 2]  # our passes end at the last watched layer, but for the first
