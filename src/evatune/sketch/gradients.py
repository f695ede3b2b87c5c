"""The sketch of gradients: R = E[GᵀG] of the examples' own gradients G by a layer's weight.

With inputs X (T, d) and output gradients g (T, out) of an example, G = gᵀX is the gradient of its
loss by the weight. At the start of LoRA, B = 0, the gradient by B is s·G·Aᵀ, so that

    E‖∂L/∂B‖² = s²·tr(A R Aᵀ),   R = E[GᵀG],

and the orthonormal A of which the most gradient flows into B are R's leading eigenvectors. No
independence of inputs and gradients is assumed. If every example were a single token, R would be
E[‖g‖² x xᵀ], EVA with weighted rows; if all data were one example, the subspace of LoRA-GA and
LoRA-One. Here an example is one sequence, image or trajectory, whatever batch it comes in.

R is positive semidefinite, and its product with a basis Ω takes thin products only: P = XΩ (T, l),
Q = gᵀP (out, l), RΩ += Xᵀ(gQ). So it is sketched as any second moment is, with the same moving
basis, certificate and merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.base import SketchSettings, SketchUpdate
from evatune.sketch.example_moment import ExampleMoment
from evatune.sketch.examples import FloatExamples
from evatune.sketch.low_rank import COLUMN_RTOL, SecondMoment
from evatune.sketch.nystrom import NystromMoment, random_rows
from evatune.sketch.spectrum import InputMoments, Spectrum, as_energies

# Random directions by which the gradients' energy outside the basis is estimated. The estimate is
# unbiased; its standard deviation is a third of that energy if it lies in one direction, and less
# by the root of their number where it is spread over many.
_PROBES = 16


@dataclass
class GradientUpdate(SketchUpdate):
    """The sums of a piece of examples; `energy`, `moment` and `fresh` are of R."""

    input_product: Tensor  # (l, d), (Σ x xᵀ·Ω)ᵀ
    input_energy: Tensor  # (), Σ ‖x‖²


class GradientSketch(ExampleMoment):
    """Streaming sketch of R, and of C = E[x xᵀ] along its directions, which scales need.

    Rows are tokens, and energies are per token, so that energy times rows is the sum over the data
    and has one unit in all layers. C is known by its product with R's basis.

    Memory: 20·d·l bytes and temporaries (T, l) and (out, l) per example. Time: 4·(d + out)·l flops
    per token for R, and half of it for the inputs; examples of up to l tokens take their T × T
    products instead, which is less.
    """

    _EXTRA: ClassVar = ("input_product", "input_energy")
    _STATE: ClassVar = (*NystromMoment._STATE, *_EXTRA)
    # G·ω is a sum over tokens, of which float32 leaves 1e-7 of the largest where they cancel out;
    # in the second moment of rows it would be the square of that.
    _COLUMN_RTOL: ClassVar = 3e-3

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        self.input_product = torch.zeros_like(self.product)
        self.input_energy = self._zeros()
        probes = random_rows(settings.width, _PROBES, settings.seed + 1)
        self._probes = probes.to(self.device)  # (p, d) float32, standard normal

    # -- examples ----------------------------------------------------------------------------------

    def _sum(self, floats: FloatExamples, rows: int) -> GradientUpdate:
        projected, image, energy = self._products(floats)
        moment, input_product, row_sum = floats.gather_beside_rows(image, projected)
        of_inputs = floats.x_back.square()
        of_gradients = of_inputs * floats.g_back.square()
        return GradientUpdate(
            rows=rows,
            row_sum=row_sum[0] * floats.x_back,
            energy=energy * of_gradients,
            moment=moment * of_gradients,
            fresh=self._fresh_squares(projected, image) * of_gradients,
            input_product=input_product * of_inputs,
            input_energy=floats.energy() * of_inputs,
        )

    def _products(self, floats: FloatExamples) -> tuple[Tensor, Tensor, Tensor]:
        """Return P = XΩ and g gᵀP, both (S, T, l), and the energy Σ‖G‖² ()."""
        g, columns = floats.g, len(self.basis)
        if floats.tokens <= columns:
            projected, kernel = floats.times(self.basis), g @ g.mT
            energy = (kernel * floats.products()).sum(dtype=self.dtype)
            return projected, kernel @ projected, energy
        tests = torch.cat([self.basis, self._probes])
        projected = floats.times(tests)
        known, probed = torch.split(g.mT @ projected, [columns, _PROBES], dim=-1)
        missed = probed - known @ (self.basis @ self._probes.T)
        inside, outside = (part.square().sum(dtype=self.dtype) for part in (known, missed))
        return projected[..., :columns], g @ known, inside + outside / _PROBES

    def _image(self, floats: FloatExamples) -> Tensor:
        _, image, _ = self._products(floats)
        return floats.gather(image)

    # -- the answer, and the inputs beside it ------------------------------------------------------

    def _answer(self, directions: Tensor, energies: Tensor) -> Spectrum:
        answer = super()._answer(directions, energies)
        count = max(self.count, 1)
        # Less than this is rounding, of which the length of A's rows must not be the inverse.
        rounding = COLUMN_RTOL**2 * self.input_energy
        along = self._inputs().along(directions[: self.components]).clamp_min(rounding) / count
        captured = float(answer.energies.sum(dtype=torch.float64))
        return replace(
            answer,
            total_energy=max(answer.total_energy, captured),  # of which a part is estimated
            inputs=InputMoments(as_energies(along.cpu()), float(self.input_energy) / count),
        )

    def _inputs(self) -> SecondMoment:
        """Return Σ x xᵀ as far as its product with the basis tells it."""
        basis = self.basis.to(self.dtype)
        return SecondMoment.of_product(basis, self.input_product, self.input_energy)

    def _move(self, basis: Tensor, product: Tensor) -> None:
        inputs = self._inputs()
        super()._move(basis, product)
        self.input_product = inputs.times(self.basis.to(self.dtype))

    def change_basis(self, basis_state: Mapping[str, Tensor]) -> None:
        inputs = self._inputs()
        super().change_basis(basis_state)
        self.input_product = inputs.times(self.basis.to(self.dtype))

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        same_basis = torch.equal(self.basis, other.basis)
        mine, theirs = self._inputs(), other._inputs()
        super()._merge_moment(other, offset)
        if not same_basis:
            basis = self.basis.to(self.dtype)
            self.input_product = mine.times(basis) + theirs.times(basis)
