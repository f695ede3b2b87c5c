"""Every type of layer on a GPU, by `evatune.calibrate`: the same as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import evatune
from evatune import Calibration, CalibrationConfig
from evatune.sketch.spectrum import Spectrum
from tests import losses
from tests.gpu.helpers import require_same
from tests.helpers import Toy, inputs
from tests.layer_models import (
    CONVS,
    Attends,
    Mixture,
    Words,
    images,
    routed,
    sequences,
    texts,
)

pytestmark = pytest.mark.gpu

SKETCH_SETTINGS = [("nystrom", False), ("nystrom", True), ("exact", False), ("incremental", True)]


class Masked(nn.Module):
    """A layer of (batch, tokens, d) that is called with a mask beside its input."""

    def __init__(self, layer: Callable[[], nn.Module], channels_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.channels_first = layer(), channels_first

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.channels_first:
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        return self.layer(x)


def masked(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same batches, in each of which some rows end early."""
    for batch in batches:
        first = next(iter(batch.values()))
        mask = torch.ones(first.shape[:2], dtype=torch.int64)
        mask[0, 5:] = 0
        mask[2, 2:] = 0
        batch["attention_mask"] = mask
    return batches


def toy_batches() -> list[dict[str, Tensor]]:
    return masked([{"x": x} for x in inputs()])


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    targets: Any


def conv_case(name: str) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(CONVS[name]())

    return Case(build, lambda: images(CONVS[name]()), ["0"])


CASES = {
    "linear, all rows": Case(Toy, inputs, None),
    "linear, masked": Case(Toy, toy_batches, None),
    "Conv1D": Case(lambda: Masked(lambda: Conv1D(24, 16)), toy_batches, None),
    "convolution, masked": Case(
        lambda: Masked(lambda: nn.Conv1d(16, 8, 3, padding=1), channels_first=True),
        toy_batches,
        ["layer"],
    ),
    **{f"convolution, {name}": conv_case(name) for name in CONVS},
    "embedding": Case(Words, texts, ["table", "head"]),
    "embedding, masked": Case(Words, lambda: masked(texts()), ["table", "head"]),
    "embedding with padding": Case(lambda: Words(padding=0), lambda: masked(texts()), ["table"]),
    "attention": Case(Attends, lambda: masked(sequences()), ["attn", "head"]),
    "attention, time first": Case(
        lambda: Attends(batch_first=False), lambda: masked(sequences()), ["attn", "head"]
    ),
    "cross-attention": Case(
        lambda: Attends(cross=True), lambda: sequences(cross=True), ["attn", "head"]
    ),
    "experts": Case(Mixture, routed, ["experts.up", "experts.down", "head"]),
    "experts, transposed": Case(
        lambda: Mixture(transposed=True), routed, ["experts.up", "experts.down"]
    ),
}


def calibrated(
    name: str, device: torch.device, sketch: str, center: bool, components: int = 6
) -> Calibration:
    case = CASES[name]
    config = CalibrationConfig(components=components, sketch=sketch, center=center, tolerance=0)
    model = case.build().to(device)
    return evatune.calibrate(model, case.batches(), config, targets=case.targets)


@cache
def moments(name: str, center: bool) -> dict[str, Tensor]:
    """(d, d) float64 by layer, from all eigenpairs that there are."""
    found = calibrated(name, torch.device("cpu"), "exact", center, components=4096)
    return {layer: moment(spectrum) for layer, spectrum in found.spectra.items()}


def moment(spectrum: Spectrum) -> Tensor:
    v = spectrum.directions.double()
    return v.T @ (spectrum.energies.double()[:, None] * v)


@pytest.mark.parametrize(("sketch", "center"), SKETCH_SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_a_layer_has_the_directions_that_it_has_on_the_cpu(
    name: str, sketch: str, center: bool, device: torch.device
) -> None:
    found = calibrated(name, device, sketch, center)
    on_cpu = calibrated(name, torch.device("cpu"), sketch, center)
    assert found.status == on_cpu.status
    assert found.batches == on_cpu.batches
    assert [layer.spec for layer in found.layers.values()] == [
        layer.spec for layer in on_cpu.layers.values()
    ]
    assert found.spectra.keys() == on_cpu.spectra.keys()
    for layer, spectrum in found.spectra.items():
        require_same(spectrum, on_cpu.spectra[layer], moments(name, center)[layer])


@pytest.mark.parametrize("objective", ["gradients", "regression"])
def test_objectives_that_see_gradients(objective: str, device: torch.device) -> None:
    config = CalibrationConfig(components=30, objective=objective, tolerance=0)
    found, on_cpu = (
        evatune.calibrate(losses.Words().to(place), losses.words(), config, targets=losses.NAMES)
        for place in (device, torch.device("cpu"))
    )
    assert found.status == on_cpu.status
    for name, spectrum in found.spectra.items():
        expected = on_cpu.spectra[name]
        if objective == "gradients":
            require_same(spectrum, expected, moment(expected))
            continue
        assert spectrum.rows == expected.rows
        assert spectrum.total_energy == pytest.approx(expected.total_energy, rel=5e-3)
        lead = spectrum.directions[:3].double() @ expected.directions[:3].double().T
        weights = expected.energies[:3].double()
        assert float(lead.square().sum(0) @ weights) >= 0.999 * float(weights.sum())


def test_rows_of_the_callers_own(device: torch.device) -> None:
    seen = set()

    def every_third(activation: Tensor, batch: Any, name: str) -> Tensor:
        seen.add(activation.device.type)
        return activation.flatten(0, 1)[::3]

    found, on_cpu = (
        evatune.calibrate(Toy().to(place), inputs(), rows=every_third)
        for place in (device, torch.device("cpu"))
    )
    assert seen == {device.type, "cpu"}
    for name, spectrum in found.spectra.items():
        require_same(spectrum, on_cpu.spectra[name], moment(on_cpu.spectra[name]))


def test_a_layer_whose_rows_are_not_finite_is_named(device: torch.device) -> None:
    model = Toy().to(device).half()
    data = [x.half() for x in inputs()]
    data[2] *= 60000  # finite, and more than float16 holds after the first block
    found = evatune.calibrate(model, data, CalibrationConfig(rank=4, tolerance=0))
    assert found.status["blocks.1.q"] == "non_finite"
    assert found.layers["blocks.1.q"].first_bad_batch == 3
