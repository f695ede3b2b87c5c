"""The default sketch: streaming Nyström approximation of the second moment with a moving basis.

Kept per layer input of width d: an orthonormal basis Ω (d, l) with l = components + oversampling -
1, and Y = C·Ω (d, l) where C = Σ x xᵀ. One update is two thin products, 4·n·d·l flops, and no copy
of the activation. C itself is recovered as Y (ΩᵀY)⁺ Yᵀ (Tropp, Yurtsever, Udell, Cevher 2017,
Fixed-rank approximation of a positive-semidefinite matrix from streaming data), which is never
above C, but for the rounding of the products: what the sketch reports, the data holds.

Two additions make a narrow sketch near-optimal. The first basis is not random: it comes from a few
block power steps on a thousand rows of the first activation. And at each refresh Ω moves to the
eigenvectors found so far, with Y carried over; every later row then acts as one more power step.
Because Ω's columns *are* the current directions, the product xΩ also gives, for nothing, the energy
that they capture on rows they have never seen: the certificate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.additive import AdditiveSketch
from evatune.sketch.base import SketchSettings, to_cpu
from evatune.sketch.low_rank import (
    COLUMN_RTOL,
    eigenpairs_by_columns,
    eigenpairs_of,
    nystrom_factors,
)
from evatune.sketch.products import takes_16_bits, thin_product
from evatune.sketch.rows import RowSketch, SelectedRows, power_of_two
from evatune.sketch.spectrum import Certificate, Spectrum, fix_signs

# Columns of the products. Fewer run no faster (matrix products work in blocks of 16) and lose
# accuracy.
_MIN_COLUMNS = 32
POWER_STEPS = 2
# Sketches are refreshed together up to this many bytes of products, of which that needs a few
# copies.
_STACK_BYTES = 16 << 20
# Temporaries of an update with rows of 16 bits.
_UNCAST_BYTES = 128 << 20


@dataclass(frozen=True)
class _Solution:
    """The eigenpairs of a stack of sketches, by their products: see `eigenpairs_by_columns`."""

    combinations: Tensor  # (G, l, l)
    energies: Tensor  # (G, l)
    counts: list[int]  # 0: this one is not solved

    def parts(self) -> Iterator[tuple[list[int], _Solution | None]]:
        """Yield the indices of solved sketches with their solution, then others with None."""
        solved = [index for index, count in enumerate(self.counts) if count]
        unsolved = [index for index, count in enumerate(self.counts) if not count]
        if solved:
            counts = [self.counts[index] for index in solved]
            yield solved, _Solution(self.combinations[solved], self.energies[solved], counts)
        if unsolved:
            yield unsolved, None


class NystromMoment(AdditiveSketch):
    """A second moment C by its product with a basis that moves to C's leading eigenvectors.

    What C is a sum of, and how its product with the basis is taken, is up to subclasses. For the
    size of the basis see `basis_columns`. The first basis is random, by the seed and the width.
    """

    _STATE: ClassVar = (*AdditiveSketch._STATE, "_padded", "product")
    _BASIS: ClassVar = (*AdditiveSketch._BASIS, "_padded")
    _COLUMN_RTOL: ClassVar = COLUMN_RTOL

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        width = settings.width
        columns = basis_columns(width, settings.components, settings.oversampling)
        # Both tensors have the columns of the text as rows: the second product runs a sixth faster
        # that way.
        # (l + 1, d): Ωᵀ and a row of zeros
        self._padded = self._zeros(columns + 1, width).float()
        self.basis.copy_(_random_basis(width, columns, settings.seed))
        # (l, d), (C·Ω)ᵀ
        self.product = self._zeros(columns, width)

    @property
    def basis(self) -> Tensor:
        """The basis Ωᵀ, (l, d) float32, orthonormal rows."""
        return self._padded[:-1]

    # -- the answer, and the next basis ------------------------------------------------------------

    def spectrum(self) -> Spectrum:
        ((_, solution),) = _solve([[self]])[0].parts()
        directions, energies, (count,) = self._eigenpairs([self], solution)
        return self._answer(directions[0, :count], energies[0, :count])

    def leading(self, count: int) -> Tensor:
        return fix_signs(self.basis[:count].cpu())

    @classmethod
    def refresh_together(cls, sketches: Sequence[Self]) -> list[Spectrum]:
        answers: dict[int, Spectrum] = {}
        stacks = list(_stackable(sketches))
        solutions = _solve([[sketches[position] for position in stack] for stack in stacks])
        for stack, solution in zip(stacks, solutions, strict=True):
            for indices, part in solution.parts():
                positions = [stack[index] for index in indices]
                spectra = cls._refresh_stack([sketches[position] for position in positions], part)
                answers.update(zip(positions, spectra, strict=True))
        return [answers[position] for position in range(len(sketches))]

    @classmethod
    def _refresh_stack(cls, sketches: Sequence[Self], solution: _Solution | None) -> list[Spectrum]:
        """Refresh sketches of equal shape."""
        directions, energies, counts = cls._eigenpairs(sketches, solution)
        answers = cls._answers(sketches, directions, energies, counts)
        for position, (sketch, count) in enumerate(zip(sketches, counts, strict=True)):
            sketch.certificate = answers[position].certificate
            if sketch.center and sketch.shift is not None:
                sketch._recenter()
            if count < len(sketch.basis):
                directions[position] = sketch._completed(directions[position, :count])
        bases = directions.float()
        # U Σ² Uᵀ on the rounded basis, not U Σ²: the carried product belongs to the float32 Ω
        # exactly.
        overlaps = bases.to(directions.dtype) @ directions.mT
        products = (overlaps * energies[:, None]) @ directions
        for sketch, basis, product in zip(sketches, bases, products, strict=True):
            sketch._move(basis, product)
            sketch._start_fresh(len(basis))
        return answers

    @classmethod
    def _answers(
        cls, sketches: Sequence[Self], directions: Tensor, energies: Tensor, counts: list[int]
    ) -> list[Spectrum]:
        """Return the spectra of eigenpairs (G, l, d) and (G, l), of which so many count."""
        return [
            sketch._answer(directions[position, :count], energies[position, :count])
            for position, (sketch, count) in enumerate(zip(sketches, counts, strict=True))
        ]

    def _move(self, basis: Tensor, product: Tensor) -> None:
        """Take another basis (l, d), and the product (l, d) that belongs to it."""
        self.basis.copy_(basis)
        self.product.copy_(product)

    def _completed(self, directions: Tensor) -> Tensor:
        """Return orthonormal rows (l, d), the first of them `directions` (≤ l, d).

        Fewer directions than columns have energy. The rest of the basis must still watch for new
        ones, so it keeps its old columns, the least energetic first, and not whatever QR makes up.
        """
        old = self.basis.to(self.dtype).flip(0)
        candidates = torch.cat([directions, old])
        completed: Tensor = torch.linalg.qr(candidates.T)[0].T
        return completed[: len(old)]

    @staticmethod
    def _eigenpairs(
        sketches: Sequence[NystromMoment], solution: _Solution | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return eigenvectors (G, l, d) as rows, eigenvalues (G, l) and counts of equal shapes.

        Descending; about the mean when centering. Beyond the count both are zero.
        """
        products = _products(sketches)
        if solution is None:
            factors = nystrom_factors(_bases(sketches), products, sketches[0]._COLUMN_RTOL)
            return eigenpairs_of(factors)
        combinations = solution.combinations.to(products.device)
        return combinations @ products, solution.energies.to(products.device), solution.counts

    def _recenter(self) -> None:
        """Move the shift to the mean so far: the eigenpairs just taken are about that mean."""
        assert self.shift is not None
        moved = (self.shift + self._mean_offset()).float()
        step = (moved - self.shift).to(self.dtype)
        self.energy += self.count * step.square().sum() - 2 * step @ self.row_sum
        self.row_sum -= self.count * step
        self.shift = moved

    def _add_moment(self, moment: Tensor) -> None:
        self.product += moment

    def _power_step(self, image: Tensor) -> None:
        """Move the basis of a sketch without rows towards `image` (l, d), C times the basis.

        It is a step on C + δI: the same eigenvectors, but of full rank, so QR never has to invent a
        column.
        """
        image = image / torch.linalg.matrix_norm(image).clamp_min(1e-30)
        image = torch.nan_to_num(image, posinf=0.0, neginf=0.0)
        self.basis.copy_(orthonormal(image + 1e-5 * self.basis))

    # -- several sketches --------------------------------------------------------------------------

    def change_basis(self, basis_state: Mapping[str, Tensor]) -> None:
        """Keep the l leading directions, as `merge` of sketches with unequal bases does."""
        if self.shift is None:
            self.set_basis(basis_state)
            return
        rows, factor = self.clone(), self._factor()
        self.set_basis(basis_state)
        image = self._product_with(factor)
        self.product = rows._moved(image, self.basis, self._offset_of(rows))
        self._add_first_moments(rows)

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        """Add the other's; exact if both bases are equal.

        Otherwise each side is first reduced to its l leading directions.
        """
        if torch.equal(self.basis, other.basis):
            self.product += other._moved(other.product, self.basis, offset)
            self._fresh += other._fresh
            self._fresh_energy += other._fresh_energy
            self._fresh_count += other._fresh_count
            return
        mine, theirs = self._factor(), other._factor()
        joint = torch.linalg.svd(torch.cat([mine, theirs]), full_matrices=False)[2]
        self.basis.copy_(joint[: len(self.basis)])
        moved = other._moved(self._product_with(theirs), self.basis, offset)
        self.product = self._product_with(mine) + moved
        self.certificate = _pool(self._certify(), other._certify())
        self._start_fresh(0)

    def _product_with(self, factor: Tensor) -> Tensor:
        """Return the product (l, d) of this basis with the moment FᵀF, for F = `factor` (m, d)."""
        return self.basis.to(self.dtype) @ factor.T @ factor

    def _moved(self, image: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
        """Return (C·basisᵀ)ᵀ (l, d) about `shift - offset`, from `image`, that about `shift`."""
        basis = basis.to(self.dtype)
        projected = basis @ offset
        crossed = torch.outer(projected, self.row_sum) + torch.outer(basis @ self.row_sum, offset)
        return image + crossed + self.count * torch.outer(projected, offset)

    def _factor(self) -> Tensor:
        """Return F (l, d), FᵀF the Nyström approximation about the shift; empty rows are zero."""
        basis = self.basis.to(self.dtype)
        return nystrom_factors(basis[None], self.product[None], self._COLUMN_RTOL)[0]


class NystromSketch(NystromMoment, RowSketch):
    """Streaming Nyström sketch of the second moment of rows.

    Memory: 12·d·l bytes and a temporary (n, l). Time: 4·n·d·l flops per update, O(d·l²) per
    refresh.
    """

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        if takes_16_bits(self.device):
            # the products take some 24 bytes of each row and column
            self._uncast_rows = max(1024, _UNCAST_BYTES // (24 * len(self._padded)))

    def _initialize(self, rows: SelectedRows) -> Tensor:
        first_rows = super()._initialize(rows)
        # their squares must neither overflow nor vanish
        scaled = first_rows * power_of_two(first_rows)
        for _ in range(POWER_STEPS):
            image = (scaled @ self.basis.T).T @ scaled
            self._power_step(image)
        return first_rows

    @classmethod
    def _answers(
        cls, sketches: Sequence[Self], directions: Tensor, energies: Tensor, counts: list[int]
    ) -> list[Spectrum]:
        """Return the spectra as each sketch's `_answer` does, with one transfer for each dtype."""
        leading = fix_signs(directions[:, : sketches[0].components].float())
        sums = [sketch._first_sums() for sketch in sketches]
        all_directions, all_energies, *moved = to_cpu([leading, energies, *chain(*sums)])
        rest = iter(moved)
        answers = []
        for position, (sketch, count) in enumerate(zip(sketches, counts, strict=True)):
            parts = all_directions[position, :count], all_energies[position, :count]
            answers.append(sketch._spectrum_of(*parts, *islice(rest, len(sums[position]))))
        return answers

    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = thin_product(chunk, self._padded.T)  # (n, l + 1)
        # rows of 16 bits are as they came, and what is made of them is shifted instead
        shift = self.shift if self.center and chunk.dtype != self._row_dtype else None
        if shift is not None:
            projected -= self._padded @ shift
        squares = self._fresh
        if len(squares):
            squares = projected[:, :-1].square().sum(0).to(self.dtype)
        # the second product then has the sum of the rows in its last row, for nothing
        projected[:, -1] = 1
        moment = thin_product(projected.T, chunk)
        if shift is not None:
            # small beside the moment, as the shift is close to the mean of the rows
            moment -= torch.outer(projected.sum(0), shift)
        return moment[-1], moment[:-1], squares


def basis_columns(width: int, components: int, oversampling: int) -> int:
    """Return the number of columns of a basis, l ≤ d.

    The products have max(k + oversampling, 32) columns, of which the basis takes all but one.
    """
    # The one is for the sum of the rows, see `NystromSketch._reduce`.
    columns = max(min(components, width) + oversampling, _MIN_COLUMNS) - 1
    return min(columns, width)


def _bases(sketches: Sequence[NystromMoment]) -> Tensor:
    """Return the bases (G, l, d) of sketches of equal shape."""
    return torch.stack([sketch.basis for sketch in sketches]).to(sketches[0].dtype)


def _products(sketches: Sequence[NystromMoment]) -> Tensor:
    """Return the products (G, l, d) of sketches of equal shape; about the mean if they center."""
    products = torch.stack([sketch.product for sketch in sketches])
    if sketches[0].center:
        for product, sketch in zip(products, sketches, strict=True):
            offset = sketch._mean_offset()
            projected = sketch.basis.to(sketch.dtype) @ offset
            product -= sketch.count * torch.outer(projected, offset)
    return products


def _solve(stacks: Sequence[Sequence[NystromMoment]]) -> list[_Solution]:
    """Return what `eigenpairs_by_columns` says of each stack.

    The small matrices go to the CPU, all at once and with one wait: a GPU takes a millisecond for
    each of their factorizations, one after another.
    """
    problems = []
    for stack in stacks:
        bases, products = _bases(stack), _products(stack)
        problems.append(torch.stack([products @ bases.mT, products @ products.mT], dim=1))
    solutions: dict[int, _Solution] = {}
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    moved = to_cpu(problems)
    for number, problem in enumerate(moved):
        alike.setdefault((problem.shape[-1], problem.dtype), []).append(number)
    for numbers in alike.values():
        cores, grams = torch.cat([moved[number] for number in numbers]).unbind(1)
        rtol = stacks[numbers[0]][0]._COLUMN_RTOL
        combinations, energies, counts = eigenpairs_by_columns(cores, grams, rtol)
        start = 0
        for number in numbers:
            part = slice(start, start := start + len(stacks[number]))
            solutions[number] = _Solution(combinations[part], energies[part], counts[part])
    return [solutions[number] for number in range(len(stacks))]


def random_rows(width: int, count: int, seed: int) -> Tensor:
    """Return standard normal rows, (count, width) float32 on the CPU: the same for all devices."""
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed((seed * 1_000_003 + width) % 2**63)
    columns = torch.randn(width, count, generator=generator, dtype=torch.float32, device=cpu)
    return columns.T


@lru_cache(maxsize=4)
def _random_basis(width: int, count: int, seed: int) -> Tensor:
    """Return orthonormal rows, (count, width) float32 on the CPU, the same for one width."""
    return orthonormal(random_rows(width, count, seed))


def orthonormal(rows: Tensor) -> Tensor:
    """Return orthonormal rows that span those of (m, d), m ≤ d."""
    basis: Tensor = torch.linalg.qr(rows.T)[0].T
    return basis


def _stackable(sketches: Sequence[NystromMoment]) -> Iterator[list[int]]:
    """Yield positions of sketches that one stack can hold."""
    stacks: dict[tuple[object, ...], list[int]] = {}
    for position, sketch in enumerate(sketches):
        key = (sketch.product.shape, sketch.device, sketch.center)
        stacks.setdefault(key, []).append(position)
    for positions in stacks.values():
        one_product = 8 * sketches[positions[0]].product.numel()
        size = max(1, _STACK_BYTES // one_product)
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def _pool(a: Certificate | None, b: Certificate | None) -> Certificate | None:
    """Return both certificates as one, weighted by their rows."""
    if a is None or b is None:
        return a or b
    rows = a.rows + b.rows
    weight_a, weight_b = a.rows / rows, b.rows / rows
    return Certificate(
        energies=weight_a * a.energies + weight_b * b.energies,
        total_energy=weight_a * a.total_energy + weight_b * b.total_energy,
        rows=rows,
    )
