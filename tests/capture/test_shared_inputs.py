"""One sketch for layers with one input, and exactly its own rows for each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import evatune
from tests.helpers import EXACT, second_moment, tiny_llama, tokens

torch.set_num_threads(1)


class Scripted(nn.Module):
    """Calls layers a, b and c as the batch says: a list of (layer, index of tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, calls: list[tuple[str, int]], *tensors: Tensor) -> None:
        for layer, index in calls:
            getattr(self, layer)(tensors[index])


def run_script(
    *forwards: list[tuple[str, int]], seed: int = 0
) -> tuple[evatune.Calibration, dict[str, Tensor]]:
    """Calibrate on scripted forwards; also the rows each layer truly saw."""
    generator = torch.Generator().manual_seed(seed)
    truth: dict[str, list[Tensor]] = {"a": [], "b": [], "c": []}
    batches = []
    for calls in forwards:
        tensors = [torch.randn(20, 8, generator=generator) * (i + 1) for i in range(4)]
        for layer, index in calls:
            truth[layer].append(tensors[index])
        batches.append((calls, *tensors))
    config = evatune.CalibrationConfig(components=4, tolerance=0)
    calibration = evatune.calibrate(Scripted(), batches, config)
    return calibration, {
        name: torch.cat(rows) if rows else torch.zeros(0, 8) for name, rows in truth.items()
    }


SAME = [("a", 0), ("b", 0), ("c", 0)]


@pytest.mark.parametrize(
    "forwards",
    [
        pytest.param([SAME] * 4, id="always the same"),
        pytest.param([SAME, SAME, [("a", 0), ("b", 1), ("c", 0)], SAME], id="b strays once"),
        pytest.param(
            [SAME, [("a", 0), ("b", 1), ("c", 1)], SAME, SAME, SAME], id="b and c stray together"
        ),
        pytest.param([SAME, [("a", 0), ("c", 0)], SAME], id="b is left out once"),
        pytest.param([[("a", 0)], SAME, SAME], id="b and c come late"),
        pytest.param(
            [[("b", 0), ("b", 1), ("a", 0), ("a", 1), ("c", 0)], SAME],
            id="several calls per forward",
        ),
        pytest.param(
            [SAME, [("a", 0), ("a", 1), ("b", 0), ("c", 1), ("c", 0)], SAME],
            id="the second call differs",
        ),
        pytest.param(
            [SAME, [("a", 0), ("a", 1), ("a", 2)], [("b", 0), ("b", 1)], SAME],
            id="whole forwards apart",
        ),
        pytest.param([[("a", 0), ("b", 1)], SAME, SAME], id="different at first, the same later"),
        pytest.param(
            [SAME, [("b", 0), ("a", 0), ("c", 3)], [("c", 1), ("a", 1), ("b", 2)]],
            id="another order",
        ),
    ],
)
def test_each_layer_gets_exactly_its_own_rows(forwards: list[list[tuple[str, int]]]) -> None:
    calibration, truth = run_script(*forwards)
    for name, rows in truth.items():
        spectrum = calibration.spectra[name]
        assert spectrum.rows == len(rows)
        assert torch.allclose(spectrum.energies.double(), second_moment(rows)[:4], rtol=1e-3)


def test_layers_with_one_input_share_one_sketch_until_they_part() -> None:
    together, _ = run_script(SAME, SAME)
    assert len({layer.input for layer in together.layers.values()}) == 1
    apart, _ = run_script(SAME, [("a", 0), ("b", 1), ("c", 0)])
    assert apart.layers["a"].input == apart.layers["c"].input != apart.layers["b"].input


def test_layers_of_a_real_model_share_what_they_should() -> None:
    calibration = evatune.calibrate(tiny_llama(), tokens(), EXACT)
    by_input: dict[int | None, list[str]] = {}
    for name, layer in calibration.layers.items():
        by_input.setdefault(layer.input, []).append(name.rsplit(".", 1)[1])
    assert sorted(map(tuple, by_input.values())) == sorted(
        2 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    )


class Overwrites(nn.Module):
    """Hands one tensor to two layers, as it is or an alias that counts its own writes, but writes
    to it in between."""

    def __init__(self, aliases: bool) -> None:
        super().__init__()
        self.aliases = aliases
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> None:
        x = x.clone()
        self.a(x.data if self.aliases else x)
        x.mul_(3)
        self.b(x.data if self.aliases else x)


@pytest.mark.parametrize("aliases", [False, True])
def test_a_tensor_written_to_between_two_layers_is_two_inputs(aliases: bool) -> None:
    xs = [torch.randn(30, 8) for _ in range(3)]
    calibration = evatune.calibrate(
        Overwrites(aliases), xs, evatune.CalibrationConfig(components=4, tolerance=0)
    )
    a, b = calibration.spectra["a"], calibration.spectra["b"]
    assert b.total_energy == pytest.approx(9 * a.total_energy, rel=1e-4)


class Parting(nn.Module):
    """a and b start with one input and part; c comes later with that same input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.split(40)
        self.a(first)
        self.b(first)
        self.a(second)
        self.b(third)
        return self.c(first)


def test_a_layer_that_comes_after_its_group_has_parted_gets_its_own_rows() -> None:
    rows = (
        torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 121)[:, None]
    )
    calibration = evatune.calibrate(Parting(), [rows], EXACT)
    for name, own in {
        "a": rows[:80],
        "b": torch.cat([rows[:40], rows[80:]]),
        "c": rows[:40],
    }.items():
        assert calibration.spectra[name].rows == len(own)
        assert calibration.spectra[name].total_energy == pytest.approx(
            float(own.square().sum(1).mean()), rel=1e-5
        )


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
def test_a_first_batch_without_rows_is_no_obstacle_when_centering(sketch: str) -> None:
    batches = [torch.zeros(0, 8), *torch.randn(4, 120, 8).unbind()]
    config = evatune.CalibrationConfig(rank=2, sketch=sketch, center=True, tolerance=0)
    assert evatune.calibrate(Parting(), batches[1:], config, targets=["c"]).status["c"].usable
    assert (
        evatune.calibrate(nn.Sequential(nn.Linear(8, 8)), batches, config).spectra["0"].rows == 480
    )


def test_a_forward_pass_in_inference_mode_is_fine_and_sees_writes_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = x + 0
            self.a(h)
            h.mul_(3)
            return self.b(h)

    batches = [torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    calibration = evatune.calibrate(
        InPlace(), batches, EXACT, forward=torch.inference_mode()(lambda m, x: m(x))
    )
    energies = {name: spectrum.total_energy for name, spectrum in calibration.spectra.items()}
    assert energies["b"] == pytest.approx(9 * energies["a"], rel=1e-5)
