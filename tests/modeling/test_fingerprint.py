"""Another model is told from the same one, wherever they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig
from evatune.calibration.checkpoint import Checkpoint
from evatune.errors import ConfigError
from evatune.modeling.fingerprint import fingerprint
from tests.helpers import Toy, tiny_bert, tokens

torch.set_num_threads(1)


SMALL = CalibrationConfig(rank=2, max_batches=4, tolerance=0)


def change(model: nn.Module, name: str, place: int) -> None:
    with torch.no_grad():
        dict(model.named_parameters(remove_duplicate=False))[name].view(-1)[place] += 0.25


DIFFERENCES = {
    "late value": ("encoder.layer.1.output.dense.weight", -1),
    "one token": ("embeddings.word_embeddings.weight", 16 * 37 + 5),
    "norm": ("encoder.layer.0.output.LayerNorm.weight", 3),
    "bias": ("encoder.layer.0.attention.self.query.bias", 7),
    "untargeted layer": ("encoder.layer.0.intermediate.dense.weight", 100),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_run_is_not_resumed_with_a_model_that_differs_in_one_value(
    difference: str, tmp_path: Path
) -> None:
    name, place = DIFFERENCES[difference]
    model, point = tiny_bert(), tmp_path / "point"
    evatune.calibrate(
        model, tokens(4), SMALL, targets=["query"], checkpoint=Checkpoint(point, every=1)
    )
    evatune.calibrate(
        tiny_bert(),
        tokens(4),
        SMALL,
        targets=["query"],
        checkpoint=Checkpoint(point, every=1, resume=True),
    )
    change(model, name, place)
    with pytest.raises(ConfigError, match=f"weights {name} was") as caught:
        evatune.calibrate(
            model,
            tokens(4),
            SMALL,
            targets=["query"],
            checkpoint=Checkpoint(point, every=1, resume=True),
        )
    assert "begin again" in str(caught.value)


def buffers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a buffer": lambda model: model[1].running_mean.add_(1),
    "the dtype": lambda model: model.to(torch.bfloat16),
    "two rows that trade places": (
        lambda model: model[0].weight.data.copy_(model[0].weight.data.flip(0))
    ),
    "the shape": lambda model: setattr(
        model[0], "weight", nn.Parameter(model[0].weight.detach().reshape(2, 8))
    ),
    "a sign of zero": lambda model: model[0].bias.data.mul_(0).neg_(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_fingerprint_shows(what: str) -> None:
    model, other = buffers(), buffers()
    for each in (model, other):
        each[0].bias.data.zero_()
    assert fingerprint(model) == fingerprint(other)
    CHANGES[what](other)
    assert fingerprint(model) != fingerprint(other)


def test_an_adapter_and_a_random_start_of_it_are_not_part_of_the_model() -> None:
    def adapted() -> nn.Module:
        return get_peft_model(Toy(), LoraConfig(target_modules=["q"], modules_to_save=["up"]))

    torch.manual_seed(1)
    one = fingerprint(adapted())
    torch.manual_seed(2)
    assert fingerprint(adapted()) == one
    assert set(one.values()) == set(fingerprint(Toy()).values())
    assert not any("lora" in name for name in one)


def test_weights_of_every_layout_have_a_fingerprint() -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.scalar = nn.Parameter(torch.tensor(2.0))
    model.transposed = nn.Parameter(torch.randn(6, 5).T)
    model.inside = nn.Parameter(torch.randn(11)[1:])  # begins in the middle of a word
    for name, dtype in (
        ("bool", torch.bool),
        ("int8", torch.int8),
        ("complex", torch.complex64),
        ("f8", torch.float8_e5m2),
    ):
        model.register_buffer(name, torch.ones(7).to(dtype))
    model.register_buffer("absent", None)
    found = fingerprint(model)
    assert len(found) == len(set(found.values())) == 8
    twin = nn.Module()
    twin.inside = nn.Parameter(model.inside.detach().clone())
    twin.transposed = nn.Parameter(model.transposed.detach().contiguous())
    assert fingerprint(twin) == {name: found[name] for name in ("inside", "transposed")}


@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr]
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_buffers_have_a_fingerprint(layout: torch.layout) -> None:
    def with_buffer(dense: Tensor) -> nn.Module:
        model = nn.Module()
        block = (2, 2) if layout == torch.sparse_bsr else None
        model.register_buffer("a", dense.to_sparse(layout=layout, blocksize=block))
        return model

    other = torch.eye(8)
    other[3, 3] = 2
    assert fingerprint(with_buffer(torch.eye(8))) == fingerprint(with_buffer(torch.eye(8)))
    assert fingerprint(with_buffer(torch.eye(8))) != fingerprint(with_buffer(other))


def test_a_conjugate_view_has_the_fingerprint_of_its_values() -> None:
    view, values = nn.Module(), nn.Module()
    numbers = torch.randn(9, dtype=torch.complex64)
    view.register_buffer("z", numbers.conj())
    values.register_buffer("z", numbers.conj().resolve_conj())
    assert fingerprint(view) == fingerprint(values)
