"""The stop rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune import CalibrationConfig, Status
from evatune.calibration.convergence import estimated_missed, is_refresh
from evatune.sketch.spectrum import Spectrum
from tests.calibration.helpers import new_state
from tests.helpers import Toy, inputs


class Apart(nn.Module):
    """Layers that each see a part of the input."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = widths
        self.layers = nn.ModuleList(nn.Linear(width, width) for width in widths)

    def forward(self, x: Tensor) -> None:
        for layer, part in zip(self.layers, x.split(self.widths, -1), strict=True):
            layer(part)


WIDTHS, DECAYS = (32, 64, 96), (0.7, 1.0, 1.5)


def texts(seed: int, count: int, sigma: float) -> list[Tensor]:
    """Batches of eight texts, whose rows resemble each other and whose lengths spread by eᶴ."""
    generator = torch.Generator().manual_seed(seed)
    amplitudes = torch.cat([truth.sqrt() for truth in moments()])
    batches = []
    for _ in range(count):
        common, own = (torch.randn(8, n, len(amplitudes), generator=generator) for n in (1, 16))
        length = (sigma * torch.randn(8, 1, 1, generator=generator)).exp()
        batches.append((length * (0.7 * common + 0.7 * own) * amplitudes).flatten(0, 1))
    return batches


def moments() -> list[Tensor]:
    """Variances of the inputs of `Apart(*WIDTHS)` in `texts`, but for a factor."""
    return [
        torch.arange(1, width + 1) ** -decay for width, decay in zip(WIDTHS, DECAYS, strict=True)
    ]


def missed(calibration: evatune.Calibration) -> float:
    """Return the share of the best directions' energy that a calibration on `texts` misses."""
    ranks, total, weight = calibration.allocate().ranks, 0.0, 0
    for (name, rank), truth in zip(ranks.items(), moments(), strict=True):
        lead = calibration.spectra[name].directions[:rank]
        total += rank * float(1 - (lead.square() @ truth).sum() / truth[:rank].sum())
        weight += rank
    return total / weight


def test_stops_when_directions_and_ranks_have_settled() -> None:
    calibration = evatune.calibrate(Toy(), inputs(200, rows=256), CalibrationConfig(rank=4))
    assert calibration.batches < 64
    assert set(calibration.status.values()) <= {Status.CONVERGED, Status.UNSETTLED}
    assert Status.CONVERGED in calibration.status.values()


def test_tolerance_zero_never_stops_early() -> None:
    calibration = evatune.calibrate(
        Toy(), inputs(200), CalibrationConfig(rank=4, tolerance=0, max_batches=37)
    )
    assert calibration.batches == 37
    assert set(calibration.status.values()) == {Status.MAX_BATCHES}


def test_data_that_never_settles_ends_at_max_batches() -> None:
    """Fresh directions all the time: what has been learnt says nothing about what comes."""

    def drifting() -> Any:
        for number in range(1000):
            x = torch.zeros(4, 16, 16)
            x[..., number % 16] = 4.0 ** (number % 16)
            yield x + 0.01 * torch.randn(4, 16, 16)

    calibration = evatune.calibrate(
        Toy(), drifting(), CalibrationConfig(rank=2, max_batches=12, tolerance=1e-6)
    )
    assert calibration.batches == 12


def test_near_equal_energies_do_not_keep_it_running() -> None:
    """Directions of equal energy rotate for ever; the space they span does not matter here
    either."""
    generator = torch.Generator().manual_seed(0)
    xs = (torch.randn(4, 256, 16, generator=generator) for _ in range(200))
    assert evatune.calibrate(Toy(), xs, CalibrationConfig(rank=4, tolerance=0.02)).batches <= 32


def test_half_of_every_refresh_is_the_last_but_one_before_it() -> None:
    points = [batch for batch in range(1, 1000) if is_refresh(batch)]
    assert points[:12] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert [2 * point for point in points[1:-2]] == points[3:]


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
@pytest.mark.parametrize("batches", [4, 8, 13, 32])
def test_the_estimate_is_what_is_missed_within_a_factor_of_two(sketch: str, batches: int) -> None:
    config = CalibrationConfig(rank=8, sketch=sketch, tolerance=0, max_batches=batches)
    found = evatune.calibrate(Apart(*WIDTHS), texts(0, batches, 0.0), config)
    assert found.estimated_missed is not None
    assert 1 / 2 < found.estimated_missed / missed(found) < 2
    assert all(layer.estimated_missed for layer in found.layers.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_no_stop_before_the_tolerance_holds_within_a_factor_of_two(seed: int, sigma: float) -> None:
    config = CalibrationConfig(rank=8, tolerance=0.02, max_batches=200)
    found = evatune.calibrate(Apart(*WIDTHS), texts(seed, 200, sigma), config)
    assert 4 <= found.batches < 200
    assert missed(found) < 2 * 0.02


def test_nothing_is_estimated_where_there_is_nothing_to_compare_with() -> None:
    found = evatune.calibrate(Toy(), inputs(1), CalibrationConfig(rank=4))
    assert found.estimated_missed is None
    assert {layer.estimated_missed for layer in found.layers.values()} == {None}


@pytest.mark.parametrize("before", [100, 300])
def test_the_estimate_is_the_same_whatever_was_compared(before: int) -> None:
    """Directions off by an angle whose square is what a share of the rows explains."""
    share = before / 400
    angle = torch.tensor(0.01 * (1 - share) / share).sqrt()
    now = spectrum(torch.eye(4)[:2], rows=400)
    turned = torch.stack([torch.eye(4)[0], angle.cos() * now.directions[1]])
    turned[1, 3] = angle.sin()
    found = estimated_missed(spectrum(turned, rows=before), now)
    assert found == pytest.approx([0, 0.01 * 1 / 4], rel=0.05)
    assert estimated_missed(now, now) == []


def spectrum(directions: Tensor, rows: int) -> Spectrum:
    energies = torch.tensor([3.0, 1.0])
    return Spectrum(directions, energies, 5.0, rows, torch.zeros(4))


def test_ranks_that_move_between_components_of_equal_worth_do_not_keep_it_running() -> None:
    """Eight layers with four strong directions, and four weak ones, which half of them can get."""
    generator = torch.Generator().manual_seed(1)
    amplitudes = torch.tensor([1.0] * 4 + [0.3] * 4 + [0.03] * 8)
    model, batches = Apart(*[16] * 8), []
    for _ in range(16):
        x = torch.randn(512, 8, 16, generator=generator) * amplitudes
        x[..., 4:8] *= (0.2 * torch.randn(8, 1, generator=generator)).exp()
        batches.append(x.flatten(1))
    half, whole = (
        evatune.calibrate(
            model, batches[:n], CalibrationConfig(rank=6, rho=4 / 3, tolerance=0)
        ).allocate()
        for n in (2, 4)
    )
    assert sum(abs(half.ranks[name] - rank) for name, rank in whole.ranks.items()) >= 8
    found = evatune.calibrate(model, batches, CalibrationConfig(rank=6, rho=4 / 3))
    assert found.batches == 4


def test_data_that_drifts_has_not_settled() -> None:
    state = new_state(Toy(), evatune.calibration.options.RunOptions())
    state.convergence.check = lambda *_: True  # type: ignore[method-assign]
    assert state.has_converged(8)
    state.refresher.drifts = True
    assert not state.has_converged(8)


def test_another_kind_of_data_after_some_batches_keeps_it_running() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0].split(8)
    scales = 0.5 ** torch.arange(8)

    def batches(*numbers: int) -> list[Tensor]:
        return [torch.randn(256, 8, generator=generator) * scales @ kinds[n] for n in numbers]

    def calibrated(first: int, tolerance: float = 0.01) -> evatune.Calibration:
        config = CalibrationConfig(rank=4, tolerance=tolerance)
        numbers = [0] * first + [1] * (64 - first)
        return evatune.calibrate(nn.Sequential(nn.Linear(32, 32)), batches(*numbers), config)

    assert calibrated(64).batches == 4
    assert calibrated(3).batches > 4  # where the rule would stop for the first time
    late = calibrated(5, tolerance=1e-6)
    assert late.batches > 16
    assert set(late.status.values()) == {Status.DRIFTING}
