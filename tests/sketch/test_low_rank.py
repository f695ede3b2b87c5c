"""Second moments known by few eigenpairs and an even tail."""

from __future__ import annotations

import pytest
import torch

from evatune.sketch.low_rank import (
    SecondMoment,
    eigenpairs_by_columns,
    eigenpairs_of,
    nystrom_factors,
    times_inverse_root,
)


def rows(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(12, count, generator=generator).double())[0].T


U = rows(3, seed=0)
ENERGIES = torch.tensor([9.0, 4.0, 1.0]).double()
EYE = torch.eye(12).double()
MATRIX = U.T @ torch.diag(ENERGIES - 0.25) @ U + 0.25 * EYE


def test_products_are_those_of_the_matrix() -> None:
    moment = SecondMoment.of_eigenpairs(U, ENERGIES, MATRIX.trace())
    v = rows(5, seed=1)
    assert torch.allclose(moment.times(v), v @ MATRIX)
    assert torch.allclose(moment.along(v), (v @ MATRIX * v).sum(1))


def test_a_product_with_a_basis_is_kept_and_the_trace_is_spread_over_the_rest() -> None:
    basis = rows(8, seed=2)
    moment = SecondMoment.of_product(basis, basis @ MATRIX, MATRIX.trace())
    assert torch.allclose(moment.times(basis), basis @ MATRIX)
    assert torch.allclose(moment.along(basis), (basis @ MATRIX * basis).sum(1))
    assert float(moment.along(EYE).sum()) == pytest.approx(float(MATRIX.trace()))


def test_an_inverse_root_whitens_what_is_known_and_blows_up_nothing_else() -> None:
    values, vectors = torch.linalg.eigh(MATRIX)
    whole = times_inverse_root(EYE, vectors.T, values, MATRIX.trace())
    assert torch.allclose(whole @ MATRIX @ whole.T, EYE)
    some = times_inverse_root(EYE, U, ENERGIES, MATRIX.trace())
    covariance = some @ MATRIX @ some.T
    assert torch.allclose(U @ covariance @ U.T, EYE[:3, :3])
    assert float(torch.linalg.matrix_norm(covariance, 2)) == pytest.approx(1)
    nothing = times_inverse_root(EYE, U, ENERGIES * 0, MATRIX.trace())
    assert bool(nothing.isfinite().all())


def test_eigenpairs_by_small_matrices_are_those_of_the_factors() -> None:
    distinct = MATRIX + torch.diag(torch.linspace(0, 0.2, 12).double())
    bases = torch.stack([rows(5, seed) for seed in (3, 4)])
    products = bases @ torch.stack([distinct, distinct @ distinct])
    directions, energies, counts = eigenpairs_of(nystrom_factors(bases, products))
    found = eigenpairs_by_columns(products @ bases.mT, products @ products.mT)
    assert found[2] == counts == [5, 5]
    assert torch.allclose(found[1], energies, rtol=1e-12)
    assert torch.allclose(
        (found[0] @ products * directions).sum(-1).abs(), torch.ones(2, 5).double()
    )


@pytest.mark.parametrize("energies", [[9.0, 4.0, 0.0], [9.0, 4.0, 1e-12]])
def test_small_matrices_say_nothing_where_a_column_holds_rounding(energies: list[float]) -> None:
    matrix = U.T @ torch.diag(torch.tensor(energies).double()) @ U
    products = U @ matrix
    cores, grams = (products @ U.T)[None], (products @ products.T)[None]
    assert eigenpairs_by_columns(cores, grams)[2] == [0]
    mixed = rows(12, seed=5)[:5]  # none of whose five columns is empty, beside three energies
    products = mixed @ matrix
    cores, grams = (products @ mixed.T)[None], (products @ products.T)[None]
    assert eigenpairs_by_columns(cores, grams)[2] == [0]
