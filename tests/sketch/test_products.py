"""Products of rows of 16 bits: what tensor cores lose, emulated on a CPU, is next to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evatune.sketch import NystromSketch
from evatune.sketch.products import thin_product
from evatune.sketch.spectrum import Spectrum
from tests.sketches import build, planted

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def steep(dtype: torch.dtype) -> Tensor:
    """(512, 96) rows whose columns fall over four orders of magnitude beside a large mean."""
    return (planted(512, 96, decay=0.9, mean=3.0) * torch.logspace(1, -3, 96)).to(dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_a_product_keeps_sixteen_bits_of_the_vectors(dtype: torch.dtype) -> None:
    x = steep(dtype)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.linalg.qr(torch.randn(96, 20, generator=generator))[0]
    projected = thin_product(x, vectors)
    moment = thin_product(projected.T, x)
    assert projected.dtype == moment.dtype == torch.float32
    for found, a, b in ((projected, x, vectors), (moment, projected.T, x)):
        # as far as single products are rounded; of many, the roundings cancel out
        bound = 2**-17 * (a.double().abs() @ b.double().abs())
        assert bool(((found - a.double() @ b.double()).abs() <= bound).all())


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_float16_takes_vectors_beyond_its_own_range(scale: float) -> None:
    x = steep(torch.float16)
    vectors = planted(96, 20)
    assert torch.equal(thin_product(x, scale * vectors), scale * thin_product(x, vectors))


def sketched(
    batches: list[Tensor], index: Tensor | None, *, cast: bool, center: bool = False
) -> Spectrum:
    sketch = build("nystrom", batches[0].shape[1], 16, center=center)
    assert isinstance(sketch, NystromSketch)
    sketch._uncast_rows = 0 if cast else 100  # two pieces a batch
    for batch in batches:
        sketch.update(batch, index)
        sketch.refresh()
    return sketch.spectrum()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_a_sketch_loses_nothing_by_rows_of_16_bits(
    dtype: torch.dtype, chosen: bool, center: bool
) -> None:
    batches = list(steep(dtype).split(128))
    index = torch.arange(0, 128, 3) if chosen else None
    uncast, cast = (sketched(batches, index, cast=cast, center=center) for cast in (False, True))
    rows = torch.cat([batch if index is None else batch[index] for batch in batches]).double()
    if center:
        rows -= rows.mean(0)
    exact = rows.square().sum() / len(rows)
    assert uncast.rows == len(rows)
    assert uncast.total_energy == pytest.approx(float(exact), rel=1e-5 if center else 1e-6)
    assert torch.allclose(uncast.energies, cast.energies, rtol=1e-3)
    assert torch.allclose(uncast.mean, cast.mean, atol=1e-5)
    for rank in (1, 4, 16):
        captured = [
            (rows @ spectrum.directions[:rank].T.double()).square().sum()
            for spectrum in (uncast, cast)
        ]
        assert float(captured[0] / captured[1]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_of_16_bits_makes_the_sketch_void(bad: float) -> None:
    sketch = build("nystrom", 96, 16)
    assert isinstance(sketch, NystromSketch)
    sketch._uncast_rows = 1024
    x = steep(torch.bfloat16)
    sketch.update(x)
    assert bool(sketch.finite)
    x[5, 7] = bad
    sketch.update(x)
    assert not bool(sketch.finite)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_a_choice_of_no_rows_adds_nothing(dtype: torch.dtype) -> None:
    batches = [steep(dtype)]
    none = torch.zeros(0, dtype=torch.int64)
    assert sketched(batches, none, cast=False).rows == 0


@pytest.mark.parametrize("size", [1e15, 3e18])
def test_rows_whose_products_overflow_make_the_sketch_void(size: float) -> None:
    sketch = build("nystrom", 96, 16)
    assert isinstance(sketch, NystromSketch)
    sketch._uncast_rows = 1024
    x = planted(512, 96)
    rows = (size * x / torch.linalg.vector_norm(x, dim=1, keepdim=True)).bfloat16()
    sketch.update(rows)
    assert bool(sketch.finite) == (size < 1e18)
    if size < 1e18:
        assert len(sketch.spectrum().energies) == 16
