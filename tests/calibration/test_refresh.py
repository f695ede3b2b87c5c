"""Drift: later rows that the earlier ones did not promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig, Status
from evatune.report.summary import layer_rows


def kinds(*numbers: int) -> list[Tensor]:
    """Batches whose rows lie in one of several spaces, by the number of the kind."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0].reshape(4, 8, 32)
    return [torch.randn(64, 8, generator=generator) @ axes[number] for number in numbers]


SORTED, MIXED = kinds(*([0] * 9 + [1] * 7)), kinds(*([0, 1] * 8))
WHOLE = CalibrationConfig(rank=4, tolerance=0, max_batches=16)


def statuses(batches: list[Tensor], config: CalibrationConfig = WHOLE) -> set[str]:
    return set(evatune.calibrate(nn.Sequential(nn.Linear(32, 32)), batches, config).status.values())


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
def test_late_batches_captured_worse_than_promised_are_a_status(sketch: str) -> None:
    config = CalibrationConfig(rank=4, tolerance=0, max_batches=16, sketch=sketch)
    assert statuses(SORTED, config) == {Status.DRIFTING}
    assert statuses(MIXED, config) == {Status.MAX_BATCHES}


def test_another_kind_that_comes_after_the_last_refresh_is_seen_too() -> None:
    assert statuses(kinds(*([0] * 12), 1)) == {Status.DRIFTING}
    assert statuses(kinds(*([0] * 13))) == {Status.DATA_EXHAUSTED}


def test_rows_that_grow_longer_or_have_no_directions_of_their_own_are_no_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(1.0, 1.6, 16)
    # longer, not elsewhere
    swelling = [scale * batch for scale, batch in zip(scales, kinds(*([0] * 16)), strict=True)]
    assert statuses(swelling) == {Status.MAX_BATCHES}
    assert statuses([torch.randn(64, 32, generator=generator) for _ in range(16)]) == {
        Status.MAX_BATCHES
    }


def test_single_sentences_are_no_drift_whatever_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    amplitudes = torch.arange(1, 33) ** -0.5

    def sentences(count: int) -> list[Tensor]:
        common, own = (torch.randn(count, n, 32, generator=generator) for n in (1, 12))
        return list((2 * common + own) * amplitudes)

    for _ in range(8):
        assert statuses(sentences(16)) == {Status.MAX_BATCHES}


def test_gradients_of_few_examples_are_no_drift_and_those_of_another_kind_are() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (0.3 * torch.randn(64, generator=generator)).exp()  # energies from 1/4 to 4
    config = CalibrationConfig(rank=8, rho=1, tolerance=0, objective="gradients")

    def status(numbers: list[int]) -> set[str]:
        batches = [size * x[None, :8] for size, x in zip(sizes, kinds(*numbers), strict=True)]
        model = nn.Sequential(nn.Linear(32, 32, bias=False))
        nn.init.eye_(model[0].weight)
        found = evatune.calibrate(
            model, batches, config, loss=lambda model, x: model(x).square().mean()
        )
        return set(found.status.values())

    assert status([0, 1, 1, 0] * 16) == {Status.MAX_BATCHES}
    assert status([0] * 40 + [1] * 24) == {Status.DRIFTING}


def test_a_drifting_layer_can_be_used_is_shown_and_survives_a_merge_and_a_file(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    found = evatune.calibrate(model, SORTED, WHOLE)
    found.require_usable()
    merged = Calibration.merge([found, evatune.calibrate(model, kinds(*([0] * 6)), WHOLE)])
    assert merged.status == {"0": Status.DRIFTING}
    merged.save(tmp_path / "merged.safetensors")
    assert Calibration.load(tmp_path / "merged.safetensors").status == {"0": Status.DRIFTING}
    (row,) = layer_rows(found, found.allocate())
    assert row.attention
    assert "shuffle" in row.advice
