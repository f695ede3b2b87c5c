"""Second moments of low rank: from a product with a basis to eigenpairs, and an even tail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Self

import torch
from torch import Tensor

# Columns below this share of the largest column's amplitude are rounding. With λ_j = ω_jᵀCω_j,
# float32 products leave an error of about 1e-7·λ_1 in Y's column j, which enters the answer as
# (1e-7·λ_1)² / λ_j.
COLUMN_RTOL = 1e-5
# Eigenvalues of the unit-diagonal core below this, or below the rounding it shows, are not data.
_CORE_RTOL = 1e-6
# Cores of which all eigenvalues are above this lose nothing by the short way to eigenpairs.
_CORE_MARGIN = 1e-3
# Small matrices are factorized by so many threads at most, so many at a time: the main thread alone
# puts all threads of OpenMP to steps of large stacks, and waits for them longer than a step takes.
_THREADS, _PIECE = 4, 8


@dataclass(frozen=True)
class SecondMoment:
    """C ≈ FᵀF + τ·(I - KᵀK): what is known of it, and the rest spread evenly over the rest of R^d.

    Attributes:
        factors: F (m, d).
        known: K (l, d), orthonormal rows on which FᵀF is C.
        tail: τ (), mean eigenvalue of the rest.
    """

    factors: Tensor
    known: Tensor
    tail: Tensor

    @classmethod
    def of_product(cls, basis: Tensor, product: Tensor, trace: Tensor) -> Self:
        """Return C by its product with orthonormal rows, both (l, d) float64, and its trace ()."""
        factors = nystrom_factors(basis[None], product[None])[0]
        return cls(factors, basis, _mean_outside(basis, factors.square().sum(), trace))

    @classmethod
    def of_eigenpairs(cls, directions: Tensor, energies: Tensor, trace: Tensor) -> Self:
        """Return C by its leading eigenpairs (m, d) and (m,), and its trace ()."""
        factors = energies.sqrt()[:, None] * directions
        return cls(factors, directions, _mean_outside(directions, energies.sum(), trace))

    def along(self, directions: Tensor) -> Tensor:
        """Return v·C·v, (k,), for each of the orthonormal rows v of `directions` (k, d)."""
        inside = (directions @ self.factors.T).square().sum(1)
        outside = 1 - (directions @ self.known.T).square().sum(1)
        return inside + self.tail * outside.clamp_min(0)

    def times(self, rows: Tensor) -> Tensor:
        """Return rows·C, (k, d)."""
        outside = rows - (rows @ self.known.T) @ self.known
        return (rows @ self.factors.T) @ self.factors + self.tail * outside


def times_inverse_root(rows: Tensor, directions: Tensor, energies: Tensor, trace: Tensor) -> Tensor:
    """Return rows·C^(-½), (k, d), for C by its leading eigenpairs (m, d), (m,) and its trace ().

    Those outside are taken to be as large as the smallest of these, which they are at most. Their
    mean would be nearer to the truth on the whole, and blow up the largest of them.
    """
    floor = torch.maximum(energies.min(), 1e-6 * trace / directions.shape[1])
    roots = torch.maximum(energies, floor).rsqrt() - floor.rsqrt()
    return ((rows @ directions.T) * roots) @ directions + floor.rsqrt() * rows


def _mean_outside(known: Tensor, captured: Tensor, trace: Tensor) -> Tensor:
    count, width = known.shape
    return (trace - captured).clamp_min(0) / max(1, width - count)


def nystrom_factors(bases: Tensor, products: Tensor, column_rtol: float = COLUMN_RTOL) -> Tensor:
    """F (G, l, d) with FᵀF = Y (ΩᵀY)⁺ Yᵀ for Ωᵀ = `bases` and Yᵀ = `products`.

    Both are (G, l, d) float64. Rows that would only be rounding are zero.
    """
    core, inverse, floor = _unit_diagonal(products @ bases.mT, column_rtol)
    values, vectors = _eigh(core)
    roots = torch.where(values > floor[:, None], values.rsqrt(), 0.0)
    weighted = inverse[:, :, None] * vectors * roots[:, None, :]
    factors: Tensor = weighted.mT @ products
    return factors


def eigenpairs_of(factors: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return eigenvectors (G, l, d) as rows, eigenvalues (G, l) and their counts, descending.

    They are those of FᵀF for `factors` (G, l, d), from the small Gram matrix FFᵀ: a third of the
    time of QR and SVD. That squares the condition, which leaves an error of 1e-16·λ_1/λ_j in
    direction j: below float32's for every energy that `COLUMN_RTOL` lets through.
    """
    combinations, values, counts = _combinations(factors @ factors.mT)
    return combinations @ factors, values, counts


def eigenpairs_by_columns(
    cores: Tensor, grams: Tensor, column_rtol: float = COLUMN_RTOL
) -> tuple[Tensor, Tensor, list[int]]:
    """Return T (G, l, l) with T·Yᵀ the eigenvectors of Y (ΩᵀY)⁺ Yᵀ, eigenvalues and their counts.

    It is `eigenpairs_of(nystrom_factors(…))` by small matrices alone, and with one
    eigendecomposition less: F = L⁻¹Yᵀ for LLᵀ = ΩᵀY, and so FFᵀ = L⁻¹ YᵀY L⁻ᵀ. The count is 0 where
    a column holds rounding, or next to nothing that the others do not: of such cores L⁻¹ loses
    digits. It is 0 in float32, too, whose range YᵀY leaves.

    Args:
        cores: (G, l, l) float64, ΩᵀY. grams: (G, l, l) float64, YᵀY.
    """
    pieces = torch.split(cores, _PIECE), torch.split(grams, _PIECE)
    workers = min(_THREADS, torch.get_num_threads())
    # asked for in a worker, the number of threads becomes its own; else each would take all cores
    with ThreadPoolExecutor(workers, initializer=torch.get_num_threads) as pool:
        solved = list(pool.map(_by_columns, *pieces, repeat(column_rtol)))
    combinations, values, counts = zip(*solved, strict=True)
    return torch.cat(combinations), torch.cat(values), list(chain.from_iterable(counts))


def _by_columns(
    cores: Tensor, grams: Tensor, column_rtol: float
) -> tuple[Tensor, Tensor, list[int]]:
    core, inverse, floor = _unit_diagonal(cores, column_rtol)
    margin = (2 * floor).clamp_min(_CORE_MARGIN)
    identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    clear = torch.linalg.cholesky_ex(core - margin[:, None, None] * identity).info == 0
    clear &= core.dtype == torch.float64
    lower = torch.linalg.cholesky_ex(torch.where(clear[:, None, None], core, identity)).L
    whitening = torch.linalg.solve_triangular(lower, torch.diag_embed(inverse), upper=False)
    whitened = torch.where(clear[:, None, None], whitening @ grams @ whitening.mT, identity)
    combinations, values, counts = _combinations(whitened)
    counts = [count * is_clear for count, is_clear in zip(counts, clear.tolist(), strict=True)]
    return combinations @ whitening, values, counts


def _unit_diagonal(cores: Tensor, column_rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return cores ΩᵀCΩ (G, l, l) with ones on the diagonal, the scales (G, l), and a floor (G,).

    A scale of zero is that of a column which only holds rounding. Eigenvalues below the floor are
    not data.

    Energies of one layer span many orders of magnitude, and so does the rounding in the columns of
    Y; without the scales, a threshold relative to the largest would drop small true directions.
    """
    skew = cores - cores.mT  # zero but for rounding, and so a measure of it
    symmetric = (cores + cores.mT) / 2
    scale = symmetric.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    above_rounding = scale > scale.amax(-1, keepdim=True) * column_rtol
    inverse = torch.where(above_rounding, 1 / scale, 0.0)
    both = inverse[:, :, None] * inverse[:, None, :]
    floor = torch.linalg.matrix_norm(both * skew).clamp_min(_CORE_RTOL)
    return both * symmetric, inverse, floor


def _combinations(grams: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return T (G, l, l) with T·F orthonormal rows, eigenvalues and counts, for grams FFᵀ."""
    values, vectors = _eigh(grams)
    values, vectors = values.flip(-1), vectors.flip(-1)
    floor = max(COLUMN_RTOL**2, torch.finfo(grams.dtype).eps)
    above_rounding = (values > 0) & (values > values[:, :1] * floor)
    weights = torch.where(above_rounding, values.rsqrt(), 0.0)
    counts = above_rounding.sum(-1).tolist()
    return (vectors * weights[:, None, :]).mT, torch.where(above_rounding, values, 0.0), counts


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (G, l), ascending, and eigenvectors (G, l, l), found on the CPU."""
    values, vectors = torch.linalg.eigh(matrices.cpu())
    return values.to(matrices.device), vectors.to(matrices.device)
