"""The default sketch: its seed, its bounds, and the laws that it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evatune.sketch import SketchSettings, make_sketch
from evatune.sketch.nystrom import NystromSketch, basis_columns
from tests.sketches import build, feed, planted, principal_angles, truth


def test_equal_seeds_give_equal_bits_and_the_seed_matters() -> None:
    rows = planted(300, 80, decay=0.99)

    def run(seed: int) -> Tensor:
        sketch = build("nystrom", 80, 8, seed=seed)
        sketch.update(rows)
        return sketch.spectrum().directions

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize(
    ("width", "components", "oversampling", "columns"),
    [(768, 64, 16, 79), (768, 4, 16, 31), (40, 64, 16, 40), (20, 4, 0, 20)],
    ids=["k + oversampling", "fewest", "no more than directions", "narrow"],
)
def test_the_basis_has_the_columns_that_are_said(
    width: int, components: int, oversampling: int, columns: int
) -> None:
    sketch = make_sketch("nystrom", SketchSettings(width, components, oversampling))
    assert isinstance(sketch, NystromSketch)
    assert len(sketch.basis) == columns
    assert basis_columns(width, components, oversampling) == columns


def test_nystrom_never_reports_more_energy_than_there_is() -> None:
    rows = planted(2000, 150, decay=0.99)
    spectrum = feed(build("nystrom", 150, 16), rows, 200)
    moment = rows.double().T @ rows.double() / len(rows)
    v = spectrum.directions.double()
    assert (spectrum.energies.double() <= (v @ moment * v).sum(1) * (1 + 1e-5)).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 120),
    d=st.integers(1, 50),
    k=st.integers(1, 12),
    center=st.booleans(),
)
def test_nystrom_is_exact_while_the_rows_fit_into_its_basis(
    seed: int, n: int, d: int, k: int, center: bool
) -> None:
    rows = planted(n, d, seed=seed, mean=1.0)
    sketch = build("nystrom", d, k, center=center)
    if d > 32 and n > 32:
        n, rows = 32, rows[:32]
    spectrum = feed(sketch, rows, 17)
    _, energies, total = truth(rows, k, center)
    found = torch.zeros(len(energies), dtype=torch.float64)
    found[: len(spectrum.energies)] = spectrum.energies.double()
    assert torch.allclose(found, energies, rtol=1e-3, atol=1e-5 * max(total, 1e-30))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_scaling_and_rotating_the_data_scales_and_rotates_the_answer(
    seed: int, factor: float
) -> None:
    rows = planted(400, 24, seed=seed)
    rotation = torch.linalg.qr(
        torch.randn(24, 24, generator=torch.Generator().manual_seed(seed + 1))
    )[0]
    plain, moved = (feed(build("nystrom", 24, 5), x, 100) for x in (rows, factor * rows @ rotation))
    assert torch.allclose(moved.energies, factor**2 * plain.energies, rtol=1e-3)
    assert principal_angles(moved.directions[:3], plain.directions[:3] @ rotation).max() < 1e-2
