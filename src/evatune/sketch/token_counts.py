"""The sketch of one-hot rows: how often each token came. Exact, and small where the rows themselves
are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.base import Sketch, SketchUpdate
from evatune.sketch.spectrum import Spectrum


class CountSketch(Sketch):
    """Counts tokens. The second moment of their one-hot rows is diagonal, with the tokens'
    frequencies on it.

    So the directions are the one-hot vectors of the most frequent tokens (ties: the lower id), the
    energies their frequencies p, and the total energy is 1 per token. With `center=True` the
    covariance, diag(p) - ppᵀ, is no longer diagonal; the directions stay one-hot vectors, the
    energies are the tokens' variances p(1 - p) and the total is 1 - Σp².

    Args:
        width: d, the number of tokens there are. Rows are given as ids, (n,) integers below it.
        components, center, device: as for `NystromSketch`.

    Memory: 16·d bytes. Time: O(n + d) per update, O(d log d) per answer. Merging is exact.
    """

    _START: ClassVar = (*Sketch._START, "known")

    def __init__(
        self,
        width: int,
        components: int,
        *,
        center: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(width, components, center=center, device=torch.device(device))
        self.known: Tensor | None = None  # (k,) tokens of the last refresh, for the certificate

    def summarize(self, x: Tensor, index: Tensor | None = None) -> SketchUpdate:
        """Summarise the tokens of `x` (n,), or those that `index` (m,) int64 selects."""
        if self.shift is None:
            self.shift = self.row_sum.float()  # zeros: counts are about nothing but 0
        tokens = x if index is None else x.index_select(0, index)
        # Not bincount, which waits for the device to find the largest.
        ones = torch.ones(len(tokens), dtype=self.dtype, device=tokens.device)
        counts = torch.zeros_like(self.row_sum).scatter_add_(0, tokens.long(), ones)
        fresh = self._fresh if self.known is None or not len(self._fresh) else counts[self.known]
        return SketchUpdate(len(tokens), counts, counts.sum(), counts.new_zeros(0), fresh)

    @classmethod
    def refresh_all(cls, sketches: Sequence[Self]) -> list[Spectrum]:
        answers = [sketch.spectrum() for sketch in sketches]
        for sketch, answer in zip(sketches, answers, strict=True):
            sketch.certificate = answer.certificate
            sketch.known = answer.directions.argmax(1).to(sketch.device)
            sketch._start_fresh(len(sketch.known))
        return answers

    def leading(self, count: int) -> Tensor:
        return (
            super().leading(count)
            if self.known is None
            else _one_hot(self.known[:count].cpu(), self.width)
        )

    def spectrum(self) -> Spectrum:
        count = max(self.count, 1)
        frequency = (self.row_sum / count).cpu()
        worth = frequency * (1 - frequency) if self.center else frequency
        tokens = torch.argsort(worth, descending=True, stable=True)[: self.components]
        tokens = tokens[frequency[tokens] > 0]
        return Spectrum(
            directions=_one_hot(tokens, self.width),
            energies=worth[tokens].float(),
            total_energy=float(worth.sum()),
            rows=self.count,
            mean=frequency.float(),
            centered=self.center,
            certificate=self._certify(),
        )

    def _merge(self, other: Self, offset: Tensor) -> None:
        self.certificate = self._certify()
        self._start_fresh(0)

    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("tokens are counted as they come; there are no rows to reduce")

    def _add(self, summarize: SketchUpdate) -> None:
        pass  # the sum of the rows is all there is


def _one_hot(tokens: Tensor, width: int) -> Tensor:
    """(n, width) float32."""
    rows = torch.zeros(len(tokens), width, dtype=torch.float32, device=tokens.device)
    return rows.scatter_(1, tokens[:, None], 1.0)
