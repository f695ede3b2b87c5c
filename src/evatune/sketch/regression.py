"""The sketch for reduced-rank regression of output gradients on inputs.

With Ḡ = E[g xᵀ] the mean gradient by the weight and C = E[x xᵀ], the change BA of rank r that comes
nearest to the step -Ḡ C⁻¹ in what it does to the outputs, E‖(ΔW - BA)x‖², has

    rows(A) = V_rᵀ C^(-½),   Ḡ C^(-½) = U S Vᵀ

(reduced-rank regression; Izenman 1975). S_j² is, but for a constant, the loss that direction j
saves in that step, in one unit for all layers. By construction A C Aᵀ = I.

Ḡ is known by two random sides, ḠΩ and ΨᵀḠ (Tropp, Yurtsever, Udell, Cevher 2017, Practical
sketching algorithms for low-rank matrix approximation), which are linear in the data; C by the
streaming Nyström sketch. Both take thin products only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.base import SketchSettings, SketchUpdate
from evatune.sketch.examples import Examples, ExampleSketch, FloatExamples
from evatune.sketch.low_rank import SecondMoment, times_inverse_root
from evatune.sketch.nystrom import POWER_STEPS, NystromMoment, orthonormal, random_rows
from evatune.sketch.spectrum import Certificate, InputMoments, Spectrum, as_energies

# Rows that choose the first basis of C.
_FIRST_ROWS = 1024


@dataclass
class RegressionUpdate(SketchUpdate):
    """The sums of a piece of examples; `energy`, `moment` and `fresh` are of C."""

    right: Tensor  # (l, out), (Σ g xᵀ·Ω)ᵀ
    left: Tensor  # (m, d), Ψᵀ·Σ g xᵀ
    gradient_energy: Tensor  # (), Σ ‖g‖²


class RegressionSketch(NystromMoment, ExampleSketch):
    """Streaming sketch of Ḡ and C, and the regression of one on the other.

    Its certificate is none: it has no directions of which fresh rows could tell anything.

    Memory: 12·d·l bytes for C and 8·(l·out + 2·l·d) for Ḡ. Time: 8·d·l + 6·out·l flops per token.
    """

    _STATE: ClassVar = (*NystromMoment._STATE, "right", "left", "gradient_energy")

    def __init__(self, settings: SketchSettings, out_features: int) -> None:
        super().__init__(settings)
        columns = len(self.basis)
        lines = min(out_features, 2 * columns + 1)
        right_test = random_rows(self.width, columns, settings.seed + 1)
        left_test = random_rows(out_features, lines, settings.seed + 2)
        self._right_test = orthonormal(right_test).to(self.device)  # Ωᵀ (l, d)
        self._left_test = orthonormal(left_test).to(self.device)  # Ψᵀ (m, out)
        self.right = self._zeros(columns, out_features)
        self.left = self._zeros(lines, self.width)
        self.gradient_energy = self._zeros()

    @property
    def watched_energy(self) -> Tensor:
        return self.energy + self.gradient_energy

    # -- examples ----------------------------------------------------------------------------------

    def _summarize(self, examples: Examples) -> RegressionUpdate:
        if self.shift is None:
            self._initialize(examples.first(_FIRST_ROWS))
        floats = FloatExamples(examples, self.width, self.dtype)
        columns = len(self.basis)
        tests = torch.cat([self.basis, self._right_test])
        projected, tested = torch.split(floats.times(tests), columns, dim=-1)
        ones = projected.new_ones(*projected.shape[:2], 1)
        coefficients = torch.cat([projected, floats.g @ self._left_test.T, ones], dim=-1)
        sums = floats.gather(coefficients).to(self.dtype)
        moment, left, row_sum = torch.split(sums, [columns, len(self._left_test), 1])
        right = tested.flatten(0, 1).T @ floats.g.flatten(0, 1)
        squares = self._fresh
        if len(squares):
            squares = projected.square().sum((0, 1), dtype=self.dtype)
        both = floats.x_back * floats.g_back
        norms = torch.linalg.vector_norm(floats.g, dim=-1).to(self.dtype)
        return RegressionUpdate(
            rows=examples.rows,
            row_sum=row_sum[0] * floats.x_back,
            energy=floats.energy() * floats.x_back.square(),
            moment=moment * floats.x_back.square(),
            fresh=squares * floats.x_back.square(),
            right=right.to(self.dtype) * both,
            left=left * both,
            gradient_energy=norms.square().sum() * floats.g_back.square(),
        )

    def _initialize(self, examples: Examples) -> None:
        """Choose the first basis, by power steps on a few rows."""
        floats = FloatExamples(examples, self.width, self.dtype)
        self.shift = self.basis.new_zeros(self.width)
        for _ in range(POWER_STEPS):
            self._power_step(floats.gather(floats.times(self.basis)))

    def add(self, update: SketchUpdate) -> None:
        assert isinstance(update, RegressionUpdate)
        super().add(update)
        self.right += update.right
        self.left += update.left
        self.gradient_energy += update.gradient_energy

    # -- the answer --------------------------------------------------------------------------------

    def _answer(self, directions: Tensor, energies: Tensor) -> Spectrum:
        """Return the spectrum of the regression; the eigenpairs given are those of C."""
        count, total = max(self.count, 1), self.energy
        if len(energies) == 0:
            nothing = super()._answer(directions, energies)
            inputs_without = InputMoments(nothing.energies, float(total) / count)
            no_rows = torch.zeros(0, 0, dtype=torch.float32, device="cpu")
            return replace(nothing, inputs=inputs_without, mixing=no_rows)
        inputs = (directions, energies / count, total / count)
        whitened = times_inverse_root(self._mean_gradient(), *inputs)
        _, singular, right = torch.linalg.svd(whitened, full_matrices=False)
        rows = times_inverse_root(right[: self.components], *inputs)
        # rows = Rᵀ Qᵀ, with Rᵀ lower triangular: the first r rows span what the first r directions
        # do.
        q, r = torch.linalg.qr(rows.T)
        answer = super()._answer(q.T, singular.square()[: self.components] * count)
        signs = (answer.directions.to(q) * q.T).sum(1).sign()
        along = SecondMoment.of_eigenpairs(*inputs).along(q.T)
        return replace(
            answer,
            total_energy=float(singular.square().sum()),
            inputs=InputMoments(as_energies(along.cpu()), float(total) / count),
            mixing=(r.T * signs).tril().float().cpu().contiguous(),
        )

    def _certificate_of(self, fresh: Tensor, fresh_energy: Tensor) -> Certificate | None:
        return None

    def _mean_gradient(self) -> Tensor:
        """(l, d) a matrix with the row space and singular values of Ḡ, per token."""
        range_basis = torch.linalg.qr(self.right.T)[0]  # (out, l)
        core = self._left_test.to(self.dtype) @ range_basis  # (m, l)
        gradient: Tensor = torch.linalg.pinv(core) @ self.left
        return gradient / max(self.count, 1)

    # -- several sketches --------------------------------------------------------------------------

    def change_basis(self, basis_state: Mapping[str, Tensor]) -> None:
        right, left, energy = self.right.clone(), self.left.clone(), self.gradient_energy.clone()
        super().change_basis(basis_state)
        self.right, self.left, self.gradient_energy = right, left, energy

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        super()._merge_moment(other, offset)
        self.right = self.right + other.right
        self.left = self.left + other.left
        self.gradient_energy = self.gradient_energy + other.gradient_energy
