"""The exact sketch: the full second moment, d × d. A reference, and fine for narrow layers."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.additive import AdditiveSketch
from evatune.sketch.base import SketchSettings
from evatune.sketch.rows import RowSketch, sum_of_rows
from evatune.sketch.spectrum import Spectrum


class ExactSketch(AdditiveSketch, RowSketch):
    """Accumulates Σ x xᵀ and takes its eigenvectors at the end, in float64 (on MPS float32).

    A float32 product is off by 1e-7 of the largest energy, which beside a token of 1e4 times the
    norm of the others is more than all of theirs.

    Memory: 8·d² bytes and a copy of 8 MiB of rows. Time: 2·n·d² float64 flops per update, twice the
    time of float32 on a CPU (on a consumer GPU, 32 to 64 times), O(d³) per answer; use it where d
    is a few thousand at most, or as the truth to compare with. Merging is exact.
    """

    optimal: ClassVar = True
    _STATE: ClassVar = (*AdditiveSketch._STATE, "known", "gram")
    _BASIS: ClassVar = (*AdditiveSketch._BASIS, "known")

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        self._row_dtype = self.dtype
        self.gram = self._zeros(self.width, self.width)
        # (k, d) directions of the last refresh, for the certificate
        self.known: Tensor | None = None

    def spectrum(self) -> Spectrum:
        gram = self.gram
        if self.center:
            offset = self._mean_offset()
            gram = gram - self.count * torch.outer(offset, offset)
        values, vectors = torch.linalg.eigh(gram)
        return self._answer(vectors.flip(1).T, values.flip(0))

    def leading(self, count: int) -> Tensor:
        if self.known is None:
            return super().leading(count)
        return self.known[:count].cpu()

    def _remember(self, directions: Tensor) -> int:
        self.known = directions.to(self.device)
        return len(directions)

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        crossed = torch.outer(other.row_sum, offset)
        moved = other.count * torch.outer(offset, offset)
        self.gram += other.gram + crossed + crossed.T + moved
        self.certificate = self._certify()
        self._start_fresh(0)

    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squares = self._fresh
        if self.known is not None and len(squares):
            projected = chunk @ self.known.T.to(chunk.dtype)
            squares = projected.square().sum(0)
        return sum_of_rows(chunk), chunk.T @ chunk, squares

    def _add_moment(self, moment: Tensor) -> None:
        self.gram += moment
