"""A layer's inputs and output gradients, example by example, and the sketches that read them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from evatune.sketch.base import Sketch, SketchUpdate
from evatune.sketch.rows import power_of_two


@dataclass(frozen=True)
class Examples:
    """Inputs of a layer and gradients by its outputs, with the tokens of an example together.

    Attributes:
        x: (S, T, d) of any float dtype; or (S, T) integers, the tokens of an embedding, whose rows
            are one-hot.
        g: (S, T, out) of any float dtype.
        rows: how many of the S·T tokens count.
        kept: (S, T) bool, those that count; None: all.
        weight: that the gradients are multiplied by to be those of an example's own loss.
    """

    x: Tensor
    g: Tensor
    rows: int
    kept: Tensor | None = None
    weight: float = 1.0

    def first(self, rows: int) -> Examples:
        """Return the first examples, of about so many rows and at least one."""
        count = max(1, rows // max(1, self.x.shape[1]))
        kept = None if self.kept is None else self.kept[:count]
        return Examples(self.x[:count], self.g[:count], rows, kept, self.weight)


class FloatExamples:
    """Examples in float32, with zeros for the tokens that do not count.

    Dense rows and gradients are multiplied by a power of two each, by which their squares stay in
    float32's range.

    Attributes:
        g: (S, T, out) float32, scaled.
        x_back, g_back: () float64, what undoes the scales; the weight of the examples is in the
            second.
    """

    def __init__(self, examples: Examples, width: int, dtype: torch.dtype) -> None:
        self._width = width
        self._dtype = dtype
        self._counts: Tensor | None = None
        if examples.kept is not None:
            self._counts = examples.kept[..., None].float()
        g = _zero_unless(examples.kept, examples.g).float()
        g_scale = power_of_two(_extremes(g).to(dtype))
        self.g = g * g_scale.float()
        self.g_back = examples.weight / g_scale
        self._x, self.x_back = examples.x, torch.ones_like(g_scale)
        if self._x.is_floating_point():
            x = _zero_unless(examples.kept, examples.x).float()
            x_scale = power_of_two(_extremes(x).to(dtype))
            self._x, self.x_back = x * x_scale.float(), 1 / x_scale

    @property
    def tokens(self) -> int:
        """Number of tokens of an example, T."""
        return self._x.shape[1]

    def times(self, basis: Tensor) -> Tensor:
        """Return the products (S, T, m) of the rows with those of `basis` (m, d) float32."""
        if self._x.is_floating_point():
            return self._x @ basis.T
        projected = nn.functional.embedding(self._x, basis.T)
        return projected if self._counts is None else projected * self._counts

    def gather(self, coefficients: Tensor) -> Tensor:
        """Return Σ coefficient · row over all tokens, (m, d), for `coefficients` (S, T, m)."""
        flat = coefficients.flatten(0, 1)
        if self._x.is_floating_point():
            return flat.T @ self._x.flatten(0, 1)
        if self._counts is not None:
            flat = flat * self._counts.flatten(0, 1)
        sums = flat.new_zeros(self._width, flat.shape[1])
        return sums.index_add_(0, self._x.flatten().long(), flat).T

    def gather_beside_rows(self, *coefficients: Tensor) -> tuple[Tensor, ...]:
        """Return what `gather` does for each (S, T, m), and then the sum of the rows, (1, d).

        One product takes all of them; sums in the dtype of sums that grow.
        """
        ones = coefficients[0].new_ones(*coefficients[0].shape[:2], 1)
        columns = [*coefficients, ones]
        sums = self.gather(torch.cat(columns, dim=-1)).to(self._dtype)
        return torch.split(sums, [column.shape[-1] for column in columns])

    def products(self) -> Tensor:
        """Return the products of the rows of an example with each other, (S, T, T)."""
        if self._x.is_floating_point():
            return self._x @ self._x.mT
        same = (self._x[:, :, None] == self._x[:, None, :]).float()
        return same if self._counts is None else same * self._counts * self._counts.mT

    def energy(self) -> Tensor:
        """Return the sum () of the rows' squared norms."""
        if self._x.is_floating_point():
            norms: Tensor = torch.linalg.vector_norm(self._x, dim=-1)
            return norms.to(self._dtype).square().sum()
        counts = torch.ones_like(self._x) if self._counts is None else self._counts
        return counts.sum(dtype=self._dtype)


class ExampleSketch(Sketch):
    """A sketch of an example's gradient by the layer's weight, G = gᵀX, in thin products only.

    Nothing of the size of the weight (out, d) is ever made.
    """

    def summarize_examples(self, pieces: Iterator[Examples]) -> SketchUpdate:
        """Return the sums over examples that come in pieces, at least one.

        It changes nothing but the starting basis of a sketch without rows.
        """
        total = self._summarize(next(pieces))
        for piece in pieces:
            other = self._summarize(piece)
            for field in fields(total):
                both = getattr(total, field.name) + getattr(other, field.name)
                setattr(total, field.name, both)
        return total

    @abstractmethod
    def _summarize(self, examples: Examples) -> SketchUpdate:
        """Return the sums over one piece."""


def _zero_unless(kept: Tensor | None, values: Tensor) -> Tensor:
    """Return values (S, T, m) with zeros where `kept` (S, T) is False."""
    return values if kept is None else values.masked_fill(~kept[..., None], 0)


def _extremes(values: Tensor) -> Tensor:
    """Return the smallest and the largest, (2,), in one reading."""
    return torch.stack(torch.aminmax(values)) if values.numel() else values.new_zeros(2)
