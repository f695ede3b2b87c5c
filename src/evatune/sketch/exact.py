"""The exact sketch: the full second moment, d × d. The reference for the others, and fine for
narrow layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.base import Sketch, SketchUpdate
from evatune.sketch.spectrum import Spectrum


class ExactSketch(Sketch):
    """Accumulates Σ x xᵀ and takes its eigenvectors at the end, all in float64 (on Apple's MPS
    float32).

    A float32 product is off by 1e-7 of the largest energy, which beside a token of 1e4 times the
    norm of the others is more than all of theirs.

    Memory: 8·d² bytes and a copy of 8 MiB of rows. Time: 2·n·d² float64 flops per update, twice the
    time of float32 on a CPU (on a GPU made for games, 32 to 64 times), O(d³) per answer; use it
    where d is a few thousand at most, or as the truth to compare with. Merging is exact. Arguments
    as for `NystromSketch`.
    """

    _START: ClassVar = (*Sketch._START, "known")
    _SUMS: ClassVar = (*Sketch._SUMS, "gram")

    def __init__(
        self,
        width: int,
        components: int,
        *,
        center: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(width, components, center=center, device=torch.device(device))
        self._row_dtype = self.dtype
        self.gram = torch.zeros(width, width, dtype=self.dtype, device=self.device)
        # (k, d) directions of the last refresh, for the certificate
        self.known: Tensor | None = None

    @classmethod
    def refresh_all(cls, sketches: Sequence[Self]) -> list[Spectrum]:
        answers = [sketch.spectrum() for sketch in sketches]
        for sketch, answer in zip(sketches, answers, strict=True):
            sketch.certificate = answer.certificate
            sketch.known = answer.directions.to(sketch.device)
            sketch._start_fresh(len(sketch.known))
        return answers

    def spectrum(self) -> Spectrum:
        gram = self.gram
        if self.center:
            offset = self._mean_offset()
            gram = gram - self.count * torch.outer(offset, offset)
        values, vectors = torch.linalg.eigh(gram)
        return self._answer(vectors.flip(1).T, values.flip(0))

    def leading(self, count: int) -> Tensor:
        return super().leading(count) if self.known is None else self.known[:count].cpu()

    def _merge(self, other: Self, offset: Tensor) -> None:
        cross = torch.outer(other.row_sum, offset)
        self.gram += other.gram + cross + cross.T + other.count * torch.outer(offset, offset)
        self.certificate = self._certify()
        self._start_fresh(0)

    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squares = self._fresh
        if self.known is not None and len(squares):
            squares = (chunk @ self.known.T.to(chunk.dtype)).square().sum(0)
        return self._row_sum(chunk), chunk.T @ chunk, squares

    def _add(self, summarize: SketchUpdate) -> None:
        self.gram += summarize.moment

    def _forget(self) -> None:
        super()._forget()
        self.gram.zero_()
