"""Second moments of low rank: from a product with a basis to eigenpairs, and an even tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Columns below this share of the largest column's amplitude are rounding. With λ_j = ω_jᵀCω_j,
# float32 products leave an error of about 1e-7·λ_1 in Y's column j, which enters the answer as
# (1e-7·λ_1)² / λ_j.
_COLUMN_RTOL = 1e-5
# Eigenvalues of the unit-diagonal core below this, or below the rounding it shows, are not data.
_CORE_RTOL = 1e-6


@dataclass(frozen=True)
class SecondMoment:
    """C ≈ Uᵀ(Λ - τ)U + τ·I: leading eigenpairs, and the rest spread evenly over the rest of R^d.

    Attributes:
        directions: U (m, d), orthonormal rows.
        energies: Λ (m,).
        tail: τ (), mean eigenvalue outside `directions`.
    """

    directions: Tensor
    energies: Tensor
    tail: Tensor

    @classmethod
    def of_product(cls, basis: Tensor, product: Tensor, trace: Tensor) -> Self:
        """Return C by its product with a basis, both (l, d) float64, and its trace ()."""
        factors = nystrom_factors(basis[None], product[None])
        directions, energies, (count,) = eigenpairs_of(factors)
        return cls.of_eigenpairs(directions[0, :count], energies[0, :count], trace)

    @classmethod
    def of_eigenpairs(cls, directions: Tensor, energies: Tensor, trace: Tensor) -> Self:
        """Return C by its leading eigenpairs (m, d) and (m,), and its trace ()."""
        count, width = directions.shape
        tail = (trace - energies.sum()).clamp_min(0) / max(1, width - count)
        return cls(directions, energies, tail)

    def along(self, directions: Tensor) -> Tensor:
        """(k,) v·C·v for each of the orthonormal rows v of `directions` (k, d)."""
        overlap = (directions @ self.directions.T).square()
        return overlap @ (self.energies - self.tail) + self.tail

    def times(self, rows: Tensor) -> Tensor:
        """(k, d) rows·C."""
        inside = (rows @ self.directions.T) * (self.energies - self.tail)
        return inside @ self.directions + self.tail * rows

    def inverse_root_times(self, rows: Tensor) -> Tensor:
        """(k, d) rows·C^(-½), with eigenvalues taken no smaller than the tail's.

        A tail without energy is taken as a millionth of the mean eigenvalue.
        """
        width = self.directions.shape[1]
        mean = (self.energies.sum() + self.tail * (width - len(self.energies))) / width
        floor = torch.maximum(self.tail, 1e-6 * mean)
        roots = torch.maximum(self.energies, floor).rsqrt() - floor.rsqrt()
        inside = (rows @ self.directions.T) * roots
        return inside @ self.directions + floor.rsqrt() * rows


def nystrom_factors(bases: Tensor, products: Tensor) -> Tensor:
    """F (G, l, d) with FᵀF = Y (ΩᵀY)⁺ Yᵀ for Ωᵀ = `bases` and Yᵀ = `products`.

    Both are (G, l, d) float64. Rows that would only be rounding are zero.
    """
    core = products @ bases.mT  # ΩᵀCΩ, (G, l, l)
    skew = core - core.mT  # zero but for rounding, and so a measure of it
    core = (core + core.mT) / 2
    # Scaled to unit diagonal first. Energies of one layer span many orders of magnitude, and so
    # does the rounding in the columns of Y; a threshold relative to the largest would drop small
    # true directions.
    scale = core.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (G, l)
    above_rounding = scale > scale.amax(-1, keepdim=True) * _COLUMN_RTOL
    inverse = torch.where(above_rounding, 1 / scale, 0.0)
    both = inverse[:, :, None] * inverse[:, None, :]
    values, vectors = torch.linalg.eigh(both * core)
    floor = torch.linalg.matrix_norm(both * skew).clamp_min(_CORE_RTOL)
    roots = torch.where(values > floor[:, None], values.rsqrt(), 0.0)
    weighted = inverse[:, :, None] * vectors * roots[:, None, :]
    factors: Tensor = weighted.mT @ products
    return factors


def eigenpairs_of(factors: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return eigenvectors (G, l, d) as rows, eigenvalues (G, l) and their counts, descending.

    They are those of FᵀF for `factors` (G, l, d), from the small Gram matrix FFᵀ: a third of the
    time of QR and SVD. That squares the condition, which leaves an error of 1e-16·λ_1/λ_j in
    direction j: below float32's for every energy that `_COLUMN_RTOL` lets through.
    """
    values, vectors = torch.linalg.eigh(factors @ factors.mT)
    values, vectors = values.flip(-1), vectors.flip(-1)
    floor = max(_COLUMN_RTOL**2, torch.finfo(factors.dtype).eps)
    above_rounding = (values > 0) & (values > values[:, :1] * floor)
    weights = torch.where(above_rounding, values.rsqrt(), 0.0)
    directions = (vectors * weights[:, None, :]).mT @ factors
    counts = above_rounding.sum(-1).tolist()
    return directions, torch.where(above_rounding, values, 0.0), counts
