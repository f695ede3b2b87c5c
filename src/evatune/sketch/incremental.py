"""The paper's sketch: incremental SVD, truncated after every minibatch (EVA's Algorithm 2; Ross et
al. 2008).

Kept for comparison with the paper. It costs an SVD of (k + n) × d per minibatch, and what
truncation drops is gone, so its directions depend on the order of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.base import Sketch, SketchUpdate
from evatune.sketch.spectrum import Spectrum


class IncrementalSketch(Sketch):
    """Sequential Karhunen-Loève: past directions, new rows and, when centring, one row that moves
    the mean.

    Minibatches of fewer rows than components wait in a buffer until there are enough, and are never
    lost. With `center=True` this is the paper's algorithm. Arguments as for `NystromSketch`.

    Memory: 4·k·d bytes and a copy of the minibatch. Time: O((k + n)·d·min(k + n, d)) per minibatch.
    """

    linear: ClassVar = False

    def __init__(
        self,
        width: int,
        components: int,
        *,
        center: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(width, components, center=center, device=torch.device(device))
        # diag(S)·V, (≤ k, d) float32
        self.factor = torch.zeros(0, width, dtype=torch.float32, device=self.device)
        # of the rows in `factor`
        self.mean = torch.zeros(width, dtype=self.dtype, device=self.device)
        self.inside = 0  # rows in `factor`
        self.buffer: list[Tensor] = []

    @classmethod
    def refresh_all(cls, sketches: Sequence[Self]) -> list[Spectrum]:
        answers = [sketch.spectrum() for sketch in sketches]
        for sketch, answer in zip(sketches, answers, strict=True):
            sketch.certificate = answer.certificate
            sketch._start_fresh(len(sketch.factor))
        return answers

    def spectrum(self) -> Spectrum:
        self._flush(at_least=1)
        singular = torch.linalg.vector_norm(self.factor.to(self.dtype), dim=1)
        seen = singular > singular.max() * 1e-7 if len(singular) else singular > 0
        directions = self.factor[seen].to(self.dtype) / singular[seen, None]
        return self._answer(directions, singular[seen].square())

    def state(self) -> dict[str, Tensor]:
        return (
            super().state()
            | self._named(("factor", "mean", "inside"))
            | {"buffer": torch.cat([self.factor[:0], *self.buffer])}
        )

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        super().set_state(state)
        self._set(("factor", "mean", "inside"), state)
        self.buffer = [state["buffer"].to(self.device)] if len(state["buffer"]) else []

    def _merge(self, other: Self, offset: Tensor) -> None:
        self._flush(at_least=1)
        other = other.clone()
        other._flush(at_least=1)
        self._combine(other.factor, other.mean + offset, other.inside)
        self.certificate = self._certify()
        self._start_fresh(0)

    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squares = self._fresh
        if len(squares):
            factor = self.factor[: len(squares)].to(self.dtype)
            directions = torch.nn.functional.normalize(
                factor, dim=1, eps=torch.finfo(self.dtype).tiny
            )
            squares = (chunk @ directions.T.to(chunk.dtype)).square().sum(0).to(self.dtype)
        return self._row_sum(chunk), chunk.clone(), squares

    def _unscaled_moment(self, moment: Tensor, back: Tensor) -> Tensor:
        return moment * back.to(moment.dtype)  # rows, and not their products

    def _join_moments(self, moments: list[Tensor]) -> Tensor:
        return torch.cat(moments)

    def _add(self, summarize: SketchUpdate) -> None:
        self.buffer.append(summarize.moment)
        if bool(self.finite):  # LAPACK would fail on NaN, and without naming a layer
            self._flush(at_least=self.components)

    def _forget(self) -> None:
        super()._forget()
        self.factor, self.mean, self.inside, self.buffer = (
            self.factor[:0],
            torch.zeros_like(self.mean),
            0,
            [],
        )
        self._start_fresh(0)

    def _flush(self, at_least: int) -> None:
        """Fold the buffered rows into the factor once there are `at_least` of them."""
        waiting = sum(map(len, self.buffer))
        if waiting < at_least:
            return
        rows = torch.cat(self.buffer)
        self.buffer = []
        mean = rows.mean(0, dtype=self.dtype)
        self._combine(rows - mean.float() if self.center else rows, mean, len(rows))

    def _combine(self, factor: Tensor, mean: Tensor, count: int) -> None:
        """Add `count` rows with the given mean whose (centred) second moment is factorᵀ·factor."""
        total = self.inside + count
        if total == 0:
            return
        stack = [self.factor, factor]
        if self.center and self.inside:
            weight = (self.inside * count / total) ** 0.5
            stack.append((weight * (self.mean - mean)).float()[None])
        _, singular, right = torch.linalg.svd(torch.cat(stack), full_matrices=False)
        k = self.components
        self.factor = (singular[:k, None] * right[:k]).contiguous()
        self.mean += (mean - self.mean) * (count / total)
        self.inside = total
