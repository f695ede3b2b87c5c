"""The paper's sketch: incremental SVD (EVA's Algorithm 2; Ross et al. 2008), for comparison.

It is truncated after every minibatch and costs an SVD of (k + n) × d each time. What truncation
drops is gone, so its directions depend on the order of the data, and its sums do not add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.base import Sketch, SketchSettings
from evatune.sketch.rows import RowSketch, sum_of_rows
from evatune.sketch.spectrum import Spectrum


class IncrementalSketch(RowSketch):
    """Sequential Karhunen-Loève: past directions and new rows; if centered, one row for the mean.

    Minibatches of fewer rows than components wait in a buffer until there are enough, and are never
    lost. With `center=True` this is the paper's algorithm.

    Memory: 4·k·d bytes and a copy of the minibatch. Time: O((k + n)·d·min(k + n, d)) per minibatch.
    """

    _STATE: ClassVar = (*Sketch._STATE, "factor", "mean", "inside")

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        # diag(S)·V, (≤ k, d) float32
        self.factor = self._zeros(0, self.width).float()
        # of the rows in `factor`
        self.mean = self._zeros(self.width)
        self.inside = 0  # rows in `factor`
        self.buffer: list[Tensor] = []

    def spectrum(self) -> Spectrum:
        self._flush(at_least=1)
        singular = torch.linalg.vector_norm(self.factor.to(self.dtype), dim=1)
        floor = singular.max() * 1e-7 if len(singular) else 0
        nonzero = singular > floor
        directions = self.factor[nonzero].to(self.dtype) / singular[nonzero, None]
        return self._answer(directions, singular[nonzero].square())

    def state(self) -> dict[str, Tensor]:
        waiting = torch.cat([self.factor[:0], *self.buffer])
        return super().state() | {"buffer": waiting}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        super().set_state(state)
        waiting = state["buffer"].to(self.device)
        self.buffer = [waiting] if len(waiting) else []

    def _remember(self, directions: Tensor) -> int:
        return len(self.factor)

    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        self._flush(at_least=1)
        other = other.clone()
        other._flush(at_least=1)
        self._combine(other.factor, other.mean + offset, other.inside)
        self.certificate = self._certify()
        self._start_fresh(0)

    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sum_of_rows(chunk), chunk.clone(), self._squared_projections(chunk)

    def _squared_projections(self, chunk: Tensor) -> Tensor:
        if len(self._fresh) == 0:
            return self._fresh
        factor = self.factor[: len(self._fresh)].to(self.dtype)
        smallest = torch.finfo(self.dtype).tiny
        directions = torch.nn.functional.normalize(factor, dim=1, eps=smallest)
        projected = chunk @ directions.T.to(chunk.dtype)
        return projected.square().sum(0).to(self.dtype)

    def _unscaled_moment(self, moment: Tensor, back: Tensor) -> Tensor:
        return moment * back.to(moment.dtype)  # rows, and not their products

    def _join_moments(self, moments: list[Tensor]) -> Tensor:
        return torch.cat(moments)

    def _add_moment(self, moment: Tensor) -> None:
        self.buffer.append(moment)
        if bool(self.finite):  # LAPACK would fail on NaN, and without naming a layer
            self._flush(at_least=self.components)

    def _flush(self, at_least: int) -> None:
        """Fold the buffered rows into the factor once there are `at_least` of them."""
        waiting = sum(map(len, self.buffer))
        if waiting < at_least:
            return
        rows = torch.cat(self.buffer)
        self.buffer = []
        mean = rows.mean(0, dtype=self.dtype)
        if self.center:
            rows = rows - mean.float()
        self._combine(rows, mean, len(rows))

    def _combine(self, factor: Tensor, mean: Tensor, count: int) -> None:
        """Add `count` rows with the given mean whose (centered) second moment is factorᵀ·factor."""
        total = self.inside + count
        if total == 0:
            return
        stack = [self.factor, factor]
        if self.center and self.inside:
            weight = (self.inside * count / total) ** 0.5
            mean_row = weight * (self.mean - mean)
            stack.append(mean_row.float()[None])
        _, singular, right = torch.linalg.svd(torch.cat(stack), full_matrices=False)
        k = self.components
        self.factor = (singular[:k, None] * right[:k]).contiguous()
        self.mean += (mean - self.mean) * (count / total)
        self.inside = total
