"""Rows of any selection, dtype, stride and size are read as what they are."""

from __future__ import annotations

import pytest
import torch

from evatune.sketch import SKETCHES
from evatune.sketch.rows import power_of_two
from evatune.sketch.spectrum import Spectrum
from tests.sketches import build, feed, planted, principal_angles, truth


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", SKETCHES)
class TestRowsInEveryForm:
    def test_rows_chosen_by_index_are_the_rows_that_count(self, kind: str, center: bool) -> None:
        rows, index = planted(500, 32), torch.arange(0, 500, 3)
        selected, gathered = build(kind, 32, 4, center=center), build(kind, 32, 4, center=center)
        selected.update(rows, index)
        gathered.update(rows[index])
        assert torch.allclose(selected.spectrum().energies, gathered.spectrum().energies, rtol=1e-4)
        assert selected.spectrum().rows == len(index)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_rows_are_read_in_float32(
        self, kind: str, center: bool, dtype: torch.dtype
    ) -> None:
        rows = planted(600, 32).to(dtype)
        half, full = build(kind, 32, 4, center=center), build(kind, 32, 4, center=center)
        half.update(rows)
        full.update(rows.float())
        assert torch.allclose(half.spectrum().energies, full.spectrum().energies, rtol=1e-3)

    def test_non_contiguous_rows_are_fine(self, kind: str, center: bool) -> None:
        rows = planted(64, 600).T[:, ::2]
        one, two = build(kind, 32, 4, center=center), build(kind, 32, 4, center=center)
        one.update(rows)
        two.update(rows.contiguous())
        assert torch.allclose(one.spectrum().energies, two.spectrum().energies, rtol=1e-4)


@pytest.mark.parametrize("factor", [1e19, 1e30, 1e-25, 1e-30])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", SKETCHES)
class TestRowsWhoseSquaresLeaveFloat32:
    def test_on_an_accelerator_where_nothing_may_be_looked_at(
        self, kind: str, center: bool, factor: float
    ) -> None:
        rows = planted(1024, 48, mean=0.5) * factor
        sketch = build(kind, 48, 6, center=center)
        sketch._may_look = False
        found = feed(sketch, rows, 128)
        seen = feed(build(kind, 48, 6, center=center), rows, 128)
        assert torch.allclose(found.energies, seen.energies, rtol=1e-5, atol=0)
        assert principal_angles(found.directions[:4], seen.directions[:4]).max() < 1e-5

    def test_they_give_the_same_directions_with_energies_in_true_units(
        self, kind: str, center: bool, factor: float
    ) -> None:
        rows = planted(1024, 48, mean=0.5)
        plain = feed(build(kind, 48, 6, center=center), rows, 128)
        scaled = feed(build(kind, 48, 6, center=center), rows * factor, 128)
        _, energies, total = truth(rows * factor, 6, center)
        assert principal_angles(scaled.directions[:4], plain.directions[:4]).max() < 1e-5
        assert torch.allclose(scaled.energies / factor**2, plain.energies.double(), rtol=1e-5)
        assert torch.allclose(scaled.energies, energies, rtol=1e-2, atol=0)
        assert scaled.total_energy == pytest.approx(total, rel=1e-6)
        assert scaled.usable == 6
        assert scaled.certificate is not None
        assert plain.certificate is not None
        assert scaled.certificate.captured() == pytest.approx(
            plain.certificate.captured(), rel=1e-5
        )
        assert torch.allclose(scaled.variances / factor**2, plain.variances.double(), rtol=1e-2)

    def test_sketches_of_them_merge_and_go_through_files(
        self, kind: str, center: bool, factor: float
    ) -> None:
        rows = planted(1024, 48) * factor
        left, right = build(kind, 48, 6, center=center), build(kind, 48, 6, center=center)
        left.update(rows[:300])
        right.update(rows[300:600])
        again = build(kind, 48, 6, center=center)
        again.set_state(left.state())
        for sketch in (left, again):
            sketch.merge(right)
            sketch.update(rows[600:])
        _, energies, _ = truth(rows, 6, center)
        assert torch.equal(left.spectrum().energies, again.spectrum().energies)
        assert torch.allclose(left.spectrum().energies, energies, rtol=0.02, atol=0)
        assert torch.equal(
            Spectrum.of_state(left.spectrum().state()).energies, left.spectrum().energies
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_is_a_power_of_two_to_the_last_bit(dtype: torch.dtype) -> None:
    for exponent in range(-120, 121):
        factor = float(power_of_two(torch.tensor([0.0, -0.7 * 2.0**exponent], dtype=dtype)))
        assert factor == 2.0**-exponent


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_of_other_dtypes_are_scaled_too(kind: str, look: bool, dtype: torch.dtype) -> None:
    rows = (planted(600, 32) * 1e19).to(dtype)
    sketch = build(kind, 32, 4)
    sketch._may_look = look
    _, energies, _ = truth(rows, 4)
    assert torch.allclose(feed(sketch, rows, 200).energies.double(), energies, rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", SKETCHES)
def test_one_late_row_whose_square_leaves_float32_counts_as_any_other(kind: str) -> None:
    rows = planted(1024, 32)
    rows[700] = 1e19
    spectrum = feed(build(kind, 32, 4), rows, 128)
    directions, energies, total = truth(rows, 4)
    assert spectrum.total_energy == pytest.approx(total, rel=1e-6)
    assert spectrum.energies[0].item() == pytest.approx(energies[0].item(), rel=1e-5)
    assert principal_angles(spectrum.directions[:1], directions[:1]).max() < 1e-6


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_still_known_as_such(kind: str, bad: float) -> None:
    rows = planted(256, 32) * 1e19
    rows[100, 3] = bad
    sketch = build(kind, 32, 4)
    sketch.update(rows)
    assert not sketch.finite
