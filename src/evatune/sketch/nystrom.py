"""The default sketch: streaming Nyström approximation of the second moment with a moving basis.

Kept per layer input of width d: an orthonormal basis Ω (d, l) with l = components + oversampling - 1, and
Y = C·Ω (d, l) where C = Σ x xᵀ. One update is two thin products, 4·n·d·l flops, and no copy of the
activation. C itself is recovered as Y (ΩᵀY)⁺ Yᵀ (Tropp, Yurtsever, Udell, Cevher 2017, Fixed-rank
approximation of a positive-semidefinite matrix from streaming data), which is never above C: what the
sketch reports, the data holds.

Two additions make a narrow sketch near-optimal. The first basis is not random: it comes from a few
block power steps on a thousand rows of the first activation. And at each refresh Ω moves to the
eigenvectors found so far, with Y carried over; every later row then acts as one more power step.
Because Ω's columns *are* the current directions, the product xΩ also gives, for nothing, the energy that
they capture on rows they have never seen: the certificate.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from evatune.sketch.base import Digest, Sketch
from evatune.spectrum import Certificate, Spectrum

# Columns of the products. Fewer run no faster (matrix products work in blocks of 16) and lose accuracy.
_MIN_COLUMNS = 32
_POWER_STEPS = 2
# Columns below this share of the largest column's amplitude are rounding. With λ_j = ω_jᵀCω_j, float32 products
# leave an error of about 1e-7·λ_1 in Y's column j, which enters the answer as (1e-7·λ_1)² / λ_j.
_COLUMN_RTOL = 1e-5
# Eigenvalues of the unit-diagonal core below this, or below the rounding it shows, are not data.
_CORE_RTOL = 1e-6


class NystromSketch(Sketch):
    """Streaming Nyström sketch.

    Args:
        width: d, size of a row.
        components: k, how many directions will be asked for.
        oversampling: extra columns; the products have max(k + oversampling, 32), of which the basis takes all but
            one, at most d.
        center: work on `x - mean` (covariance) instead of `x`; an exact correction, not a second pass.
        seed: of the random start of the first basis, together with `width`.
        device: where the rows live.

    Memory: 12·d·l bytes and a temporary (n, l). Time: 4·n·d·l flops per update, O(d·l²) per refresh.
    """

    def __init__(
        self,
        width: int,
        components: int,
        *,
        oversampling: int = 16,
        center: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(width, components, center=center, device=torch.device(device))
        # One column of the products is for the sum of the rows, see `_reduce`.
        columns = min(max(self.components + oversampling, _MIN_COLUMNS) - 1, width)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + width) % 2**63)
        start = torch.randn(width, columns, generator=generator)
        self._set_basis(torch.linalg.qr(start)[0].to(self.device))
        self.product = torch.zeros(width, columns, dtype=self.dtype, device=self.device)  # (d, l), C·Ω

    def refresh(self) -> Spectrum:
        directions, energies = self._eigenpairs()
        answer = self._answer(directions, energies)
        self.certificate = answer.certificate
        if self.center and self.shift is not None:
            self._recentre()
        old = self.basis
        if directions.shape[1] < old.shape[1]:
            # Fewer directions than columns have energy. The rest of the basis must still watch for new
            # ones, so it keeps its old columns, the least energetic first, and not whatever QR makes up.
            directions = torch.linalg.qr(torch.cat([directions, old.to(directions.dtype).flip(1)], dim=1))[0]
            directions = directions[:, : old.shape[1]]
            energies = torch.cat([energies, energies.new_zeros(old.shape[1] - len(energies))])
        self._set_basis(directions)
        # U Σ² Uᵀ on the rounded basis, not U Σ²: the carried product belongs to the float32 Ω exactly.
        self.product = directions * energies @ (directions.T @ self.basis.to(self.dtype))
        self._start_fresh(old.shape[1])
        return answer

    def spectrum(self) -> Spectrum:
        return self._answer(*self._eigenpairs())

    def _merge(self, other: Self, offset: Tensor) -> None:
        """Exact when both bases are equal; otherwise each side is first reduced to its l leading directions."""
        if torch.equal(self.basis, other.basis):
            self.product += other._image(other.product, self.basis, offset)
            self._fresh += other._fresh
            self._fresh_energy += other._fresh_energy
            self._fresh_count += other._fresh_count
            return
        mine, theirs = self._factor(), other._factor()
        joint = torch.linalg.svd(torch.cat([mine, theirs], dim=1), full_matrices=False)[0]
        self._set_basis(joint[:, : self.basis.shape[1]])
        basis = self.basis
        on = basis.to(self.dtype)
        self.product = mine @ (mine.T @ on) + other._image(theirs @ (theirs.T @ on), basis, offset)
        self.certificate = _pool(self._certify(), other._certify())
        self._start_fresh(0)

    def _begin(self, x: Tensor, index: Tensor | None) -> Tensor:
        head = super()._begin(x, index)
        for _ in range(_POWER_STEPS):
            # Power steps on C + δI: the same eigenvectors, but of full rank, so QR never has to invent a column.
            image = head.T @ (head @ self.basis)
            image = torch.nan_to_num(image / torch.linalg.matrix_norm(image).clamp_min(1e-30), posinf=0.0, neginf=0.0)
            self._set_basis(torch.linalg.qr(image + 1e-5 * self.basis)[0])
        return head

    def _set_basis(self, basis: Tensor) -> None:
        """(d, l) float32, stored by columns: the product with the rows runs a tenth faster."""
        padded = basis.new_zeros(basis.shape[1] + 1, self.width, dtype=torch.float32)
        padded[:-1] = basis.T
        self._padded = padded.T  # (d, l + 1)
        self.basis = self._padded[:, :-1]  # (d, l), a view

    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = chunk @ self._padded  # (n, l + 1)
        squares = projected[:, :-1].square().sum(0).to(self.dtype) if len(self._fresh) else self._fresh
        projected[:, -1] = 1  # the second product then has the sum of the rows in its last column, for nothing
        moment = chunk.T @ projected
        return moment[:, -1], moment[:, :-1], squares

    def _add(self, digest: Digest) -> None:
        self.product += digest.moment

    def _forget(self) -> None:
        super()._forget()
        self.product.zero_()

    def _recentre(self) -> None:
        """Move the shift to the mean so far: the eigenpairs just taken are about that mean."""
        assert self.shift is not None
        moved = (self.shift + self._mean_offset()).float()
        step = (moved - self.shift).to(self.dtype)
        self.energy += self.count * step.square().sum() - 2 * step @ self.row_sum
        self.row_sum -= self.count * step
        self.shift = moved

    def _image(self, image: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
        """C·basis (d, l) with rows about `shift - offset`, from `image`, the same about `shift`."""
        on = basis.to(self.dtype)
        along = offset @ on
        crossed = torch.outer(self.row_sum, along) + torch.outer(offset, self.row_sum @ on)
        return image + crossed + self.count * torch.outer(offset, along)

    def _factor(self) -> Tensor:
        """F (d, m) with F·Fᵀ the Nyström approximation about the shift."""
        return _nystrom_factor(self.basis.to(self.dtype), self.product)

    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (d, m) and eigenvalues (m,), descending, m ≤ l; about the mean when centring."""
        basis, product = self.basis.to(self.dtype), self.product
        if self.center:
            offset = self._mean_offset()
            product = product - self.count * torch.outer(offset, offset @ basis)
        return _eigenpairs_of(_nystrom_factor(basis, product))


def _nystrom_factor(basis: Tensor, product: Tensor) -> Tensor:
    """F (d, m) with F·Fᵀ = Y (ΩᵀY)⁺ Yᵀ for Ω = `basis` and Y = `product`, both (d, l) float64."""
    core = basis.T @ product  # ΩᵀCΩ, (l, l)
    skew = core - core.T  # zero but for rounding, and so a measure of it
    core = (core + core.T) / 2
    # Scaled to unit diagonal first. Energies of one layer span many orders of magnitude, and so does the
    # rounding in the columns of Y; a threshold relative to the largest would drop small true directions.
    scale = core.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > scale.max() * _COLUMN_RTOL, 1 / scale, 0.0)
    values, vectors = torch.linalg.eigh(inverse[:, None] * core * inverse)
    keep = values > torch.linalg.matrix_norm(inverse[:, None] * skew * inverse).clamp_min(_CORE_RTOL)
    factor: Tensor = product @ (inverse[:, None] * vectors[:, keep] / values[keep].sqrt())
    return factor


def _eigenpairs_of(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (d, m) and eigenvalues (m,), descending, of F·Fᵀ for F = `factor` (d, m) float64.

    From the small Gram matrix FᵀF: a third of the time of QR and SVD. That squares the condition, which leaves
    an error of 1e-16·λ_1/λ_j in direction j: below float32's for every energy that `_COLUMN_RTOL` lets through.
    """
    values, vectors = torch.linalg.eigh(factor.T @ factor)
    floor = max(_COLUMN_RTOL**2, torch.finfo(factor.dtype).eps)
    keep = values > values.amax() * floor if len(values) else values > 0
    values, vectors = values[keep].flip(0), vectors[:, keep].flip(1)
    return factor @ (vectors / values.sqrt()), values


def _pool(a: Certificate | None, b: Certificate | None) -> Certificate | None:
    """Both certificates as one, weighted by their rows."""
    if a is None or b is None:
        return a or b
    rows = a.rows + b.rows
    wa, wb = a.rows / rows, b.rows / rows
    return Certificate(wa * a.energies + wb * b.energies, wa * a.total_energy + wb * b.total_energy, rows)
