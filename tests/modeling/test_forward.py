"""Batches of every kind, and the default rule by which a model is called."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

import evatune
from evatune.errors import DataError
from evatune.modeling.forward import to_device
from tests.helpers import EXACT, Toy, inputs

torch.set_num_threads(1)


@dataclass
class Batch:
    x: Tensor
    attention_mask: Tensor


def as_kind(kind: str, xs: list[Tensor]) -> Any:
    full = [torch.ones(4, x.shape[1]) for x in xs]
    return {
        "tensors": lambda: xs,
        "tuples": lambda: [(x,) for x in xs],
        "lists": lambda: [[x] for x in xs],
        "dicts": lambda: [{"x": x} for x in xs],
        "BatchEncoding": lambda: [
            BatchEncoding({"x": x, "attention_mask": m}) for x, m in zip(xs, full, strict=True)
        ],
        "UserDict": lambda: [UserDict({"x": x}) for x in xs],
        "dataclass": lambda: [Batch(x, m) for x, m in zip(xs, full, strict=True)],
        "generator": lambda: (x for x in xs),
        "iterator": lambda: iter(xs),
        "DataLoader": lambda: torch.utils.data.DataLoader(torch.cat(xs), batch_size=4),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "tuples",
        "lists",
        "dicts",
        "BatchEncoding",
        "UserDict",
        "dataclass",
        "generator",
        "iterator",
        "DataLoader",
    ],
)
def test_batches_of_every_kind_give_the_same(kind: str) -> None:
    xs = inputs()
    expected = evatune.calibrate(Toy(), xs, EXACT)
    found = evatune.calibrate(Toy(), as_kind(kind, xs), EXACT)
    for name, spectrum in expected.spectra.items():
        assert torch.equal(found.spectra[name].energies, spectrum.energies)


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    attention_mask: Tensor


@pytest.mark.parametrize("kind", [Batch, Frozen])
def test_a_batch_that_is_a_dataclass_goes_to_the_models_device_as_one(
    kind: type[Batch | Frozen],
) -> None:
    with torch.inference_mode():
        batch = kind(torch.ones(2, 3), torch.ones(2))
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is kind
    assert {getattr(moved, field.name).device.type for field in fields(moved)} == {"meta"}
    assert batch.x.device.type == "cpu"
    assert batch.x.is_inference()
    assert not to_device(batch, None).x.is_inference()


def test_each_batch_is_read_once_and_no_more_than_max_batches() -> None:
    read = []

    def stream() -> Iterator[Tensor]:
        for number, x in enumerate(inputs(50)):
            read.append(number)
            yield x

    config = evatune.CalibrationConfig(rank=4, max_batches=5, tolerance=0)
    calibration = evatune.calibrate(Toy(), stream(), config)
    assert read == [0, 1, 2, 3, 4]
    assert calibration.batches == 5


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "not one batch came"),
        (iter(()), "not one batch came"),
        (torch.zeros(2, 3, 16), "a single Tensor"),
        ({"x": torch.zeros(2, 3, 16)}, "a single dict"),
        (None, "NoneType, which cannot be iterated over"),
        (3, "int, which cannot be iterated over"),
    ],
)
def test_what_is_not_batches_is_refused_in_one_sentence(batches: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        evatune.calibrate(Toy(), batches)


def test_a_batch_the_model_does_not_take_gets_a_hint() -> None:
    with pytest.raises(TypeError) as caught:
        evatune.calibrate(Toy(), [{"pixels": torch.zeros(1)}])
    assert "pass forward=lambda model, batch" in caught.value.__notes__[0]


def test_a_packed_sequence_is_one_argument_and_keeps_its_sizes_on_the_cpu() -> None:
    packed = pack_sequence([torch.randn(3, 16), torch.randn(2, 16)])
    moved = to_device((packed, torch.ones(2)), torch.device("meta"))[0]
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
    model = nn.Module()
    model.fc = nn.Linear(16, 4)
    model.forward = lambda sequence: model.fc(sequence.data)  # type: ignore[method-assign]
    found = evatune.calibrate(model, [packed] * 3, EXACT, progress=None)
    assert found.spectra["fc"].rows == 15
