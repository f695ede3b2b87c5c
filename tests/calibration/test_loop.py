"""The stop rule, the statuses and the record."""

from __future__ import annotations

import pytest
import torch

import evatune
from evatune import CalibrationConfig, Status
from tests.helpers import Toy, inputs, tiny_bert, tokens

torch.set_num_threads(1)


# -- stop rule -------------------------------------------------------------------------------------


def test_data_that_ends_first_is_a_status_and_the_result_stands() -> None:
    calibration = evatune.calibrate(Toy(), inputs(3), CalibrationConfig(rank=4, tolerance=0))
    assert set(calibration.status.values()) == {Status.DATA_EXHAUSTED}
    assert sum(calibration.allocate().ranks.values()) == 4 * 10


def test_progress_is_told_after_each_batch() -> None:
    seen: list[evatune.Progress] = []
    evatune.calibrate(
        Toy(), inputs(5), CalibrationConfig(rank=4, tolerance=0), progress=seen.append
    )
    assert [p.batch for p in seen] == [1, 2, 3, 4, 5]
    assert {p.layers for p in seen} == {10}


# -- statuses --------------------------------------------------------------------------------------


def test_short_batches_count_and_never_hang() -> None:
    xs = [torch.randn(1, 3, 16) for _ in range(40)]
    calibration = evatune.calibrate(Toy(), xs, CalibrationConfig(rank=8, tolerance=0))
    assert calibration.spectra["blocks.0.q"].rows == 120
    assert set(calibration.status.values()) == {Status.DATA_EXHAUSTED}


@pytest.mark.parametrize("sketch", ["nystrom", "exact", "incremental"])
def test_every_sketch_runs_the_whole_way(sketch: str) -> None:
    calibration = evatune.calibrate(
        tiny_bert(), tokens(8), CalibrationConfig(rank=4, sketch=sketch, center=True)
    )
    assert sum(calibration.allocate().ranks.values()) == 4 * len(calibration.layers)


def test_more_components_than_features_is_fine() -> None:
    calibration = evatune.calibrate(Toy(), inputs(), CalibrationConfig(components=500))
    assert calibration.spectra["blocks.0.q"].directions.shape == (16, 16)
    assert calibration.spectra["blocks.0.down"].directions.shape == (32, 32)


# -- determinism -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits() -> None:
    one, two = (
        evatune.calibrate(Toy(), inputs(), CalibrationConfig(rank=4, seed=3)) for _ in range(2)
    )
    for name in one.spectra:
        assert torch.equal(one.spectra[name].directions, two.spectra[name].directions)


# -- record ----------------------------------------------------------------------------------------


def test_a_loaders_seed_is_not_drawn_from_the_callers_random_state() -> None:
    loader = torch.utils.data.DataLoader(torch.cat(inputs()), batch_size=4, shuffle=True)
    before = torch.random.get_rng_state()
    evatune.calibrate(Toy(), loader, CalibrationConfig(rank=4))
    assert torch.equal(torch.random.get_rng_state(), before)


# -- data that comes sorted, and numbers far from 1 ------------------------------------------------
