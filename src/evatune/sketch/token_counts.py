"""The sketch of one-hot rows: how often each token came. Exact, at the size of a vocabulary."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.additive import AdditiveSketch
from evatune.sketch.base import InputSketch, SketchSettings, SketchUpdate
from evatune.sketch.spectrum import Spectrum


class CountSketch(AdditiveSketch, InputSketch):
    """Counts tokens. The second moment of one-hot rows is diagonal, of the tokens' frequencies.

    So the directions are the one-hot vectors of the most frequent tokens (ties: the lower id), the
    energies their frequencies p, and the total energy is 1 per token. With `center=True` the
    covariance, diag(p) - ppᵀ, is no longer diagonal; the directions stay one-hot vectors, the
    energies are the tokens' variances p(1 - p) and the total is 1 - Σp².

    The width d is the number of tokens there are. Rows are given as ids, (n,) integers below it.

    Memory: 16·d bytes. Time: O(n + d) per update, O(d log d) per answer. Merging is exact.
    """

    _STATE: ClassVar = (*AdditiveSketch._STATE, "known")
    _BASIS: ClassVar = (*AdditiveSketch._BASIS, "known")

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        self.known: Tensor | None = None  # (k,) tokens of the last refresh, for the certificate

    def summarize(self, x: Tensor, index: Tensor | None = None) -> SketchUpdate:
        """Return the counts of the tokens of `x` (n,), or of those that `index` (m,) selects."""
        if self.shift is None:
            self.shift = self.row_sum.float()  # zeros: counts are about nothing but 0
        tokens = x if index is None else x.index_select(0, index)
        # Not bincount, which waits for the device to find the largest.
        ones = torch.ones(len(tokens), dtype=self.dtype, device=tokens.device)
        counts = torch.zeros_like(self.row_sum).scatter_add_(0, tokens.long(), ones)
        fresh = self._fresh
        if self.known is not None and len(fresh):
            fresh = counts[self.known]
        return SketchUpdate(
            rows=len(tokens),
            row_sum=counts,
            energy=counts.sum(),
            moment=counts.new_zeros(0),
            fresh=fresh,
        )

    def spectrum(self) -> Spectrum:
        frequency = (self.row_sum / max(self.count, 1)).cpu()
        energies = frequency * (1 - frequency) if self.center else frequency
        tokens = torch.argsort(energies, descending=True, stable=True)[: self.components]
        tokens = tokens[frequency[tokens] > 0]
        return Spectrum(
            directions=_one_hot(tokens, self.width),
            energies=energies[tokens].float(),
            total_energy=float(energies.sum()),
            rows=self.count,
            mean=frequency.float(),
            centered=self.center,
            certificate=self._certify(),
        )

    def leading(self, count: int) -> Tensor:
        if self.known is None:
            return super().leading(count)
        return _one_hot(self.known[:count].cpu(), self.width)

    def _remember(self, directions: Tensor) -> int:
        self.known = directions.argmax(1).to(self.device)
        return len(directions)

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        self.certificate = self._certify()
        self._start_fresh(0)

    def _add_moment(self, moment: Tensor) -> None:
        pass  # the sum of the rows is all there is


def _one_hot(tokens: Tensor, width: int) -> Tensor:
    """Return the one-hot rows of tokens (n,), (n, width) float32."""
    rows = torch.zeros(len(tokens), width, dtype=torch.float32, device=tokens.device)
    return rows.scatter_(1, tokens[:, None], 1.0)
