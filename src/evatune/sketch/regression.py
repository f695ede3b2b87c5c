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

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from evatune.sketch.base import SketchSettings, SketchUpdate
from evatune.sketch.example_moment import ExampleMoment
from evatune.sketch.examples import FloatExamples
from evatune.sketch.low_rank import SecondMoment, times_inverse_root
from evatune.sketch.nystrom import NystromMoment, orthonormal, random_rows
from evatune.sketch.spectrum import Certificate, InputMoments, Spectrum, as_energies


@dataclass
class RegressionUpdate(SketchUpdate):
    """The sums of a piece of examples; `energy`, `moment` and `fresh` are of C."""

    right: Tensor  # (l, out), (Σ g xᵀ·Ω)ᵀ
    left: Tensor  # (m, d), Ψᵀ·Σ g xᵀ
    gradient_energy: Tensor  # (), Σ ‖g‖²


class RegressionSketch(ExampleMoment):
    """Streaming sketch of Ḡ and C, and the regression of one on the other.

    Its certificate is none: it has no directions of which fresh rows could tell anything.

    Memory: 12·d·l bytes for C and 8·(l·out + 2·l·d) for Ḡ. Time: 8·d·l + 6·out·l flops per token.
    """

    _EXTRA: ClassVar = ("right", "left", "gradient_energy")
    _STATE: ClassVar = (*NystromMoment._STATE, *_EXTRA)

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

    def _sum(self, floats: FloatExamples, rows: int) -> RegressionUpdate:
        tests = torch.cat([self.basis, self._right_test])
        projected, tested = torch.split(floats.times(tests), len(self.basis), dim=-1)
        tested_gradients = floats.g @ self._left_test.T
        moment, left, row_sum = floats.gather_beside_rows(projected, tested_gradients)
        right = tested.flatten(0, 1).T @ floats.g.flatten(0, 1)
        both = floats.x_back * floats.g_back
        norms = torch.linalg.vector_norm(floats.g, dim=-1).to(self.dtype)
        return RegressionUpdate(
            rows=rows,
            row_sum=row_sum[0] * floats.x_back,
            energy=floats.energy() * floats.x_back.square(),
            moment=moment * floats.x_back.square(),
            fresh=self._fresh_squares(projected, projected) * floats.x_back.square(),
            right=right.to(self.dtype) * both,
            left=left * both,
            gradient_energy=norms.square().sum() * floats.g_back.square(),
        )

    def _image(self, floats: FloatExamples) -> Tensor:
        return floats.gather(floats.times(self.basis))

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
        """Return a matrix (l, d) with the row space and singular values of Ḡ, per token."""
        range_basis = torch.linalg.qr(self.right.T)[0]  # (out, l)
        core = self._left_test.to(self.dtype) @ range_basis  # (m, l)
        gradient: Tensor = torch.linalg.pinv(core) @ self.left
        return gradient / max(self.count, 1)
