"""Second moments known by few eigenpairs and an even tail."""

from __future__ import annotations

import pytest
import torch

from evatune.sketch.low_rank import SecondMoment, times_inverse_root


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
