"""The loop over dense rows: casting, gathering, centering and scaling in bounded buffers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evatune.sketch.base import InputSketch, SketchSettings, SketchUpdate

# Casting, gathering and centering go through buffers of this size instead of a second copy of the
# activation. On an accelerator each buffer costs a dozen launches, in which 64 MiB could be read.
_CHUNK_BYTES, _CHUNK_BYTES_ACCELERATOR = 8 << 20, 64 << 20
# Rows that choose an empty sketch's shift and basis. Half as many cost the Nyström sketch a third
# of a per cent of the energy in the worst layer of MiniLM, sixteen batches later.
FIRST_ROWS = 1024
_EPSILON = torch.finfo(torch.float32).eps
# Root mean squares of rows between which float32 products neither overflow nor lose small
# directions.
_SAFE_RMS = (2.0**-40, 2.0**40)


@dataclass(frozen=True)
class SelectedRows:
    """Rows of an activation, all of them or those that an index selects."""

    x: Tensor  # (n, d), any float dtype, any strides
    index: Tensor | None  # (m,) int64

    def __len__(self) -> int:
        return len(self.x if self.index is None else self.index)

    def take(self, rows: slice) -> Tensor:
        """Return some of the rows, a view where all are selected."""
        if self.index is None:
            return self.x[rows]
        return self.x.index_select(0, self.index[rows])

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield the rows, so many at a time."""
        # once even for no rows, so that an update always has its shapes
        for start in range(0, max(len(self), 1), size):
            yield self.take(slice(start, start + size))

    def first(self, limit: int) -> Tensor:
        """Return evenly spread rows, (≤ limit, d) float32, with zeros for NaN and Inf."""
        stride = max(1, -(-len(self) // limit))
        rows = self.take(slice(None, None, stride)).float()
        return torch.nan_to_num(rows, posinf=0.0, neginf=0.0)


class RowSketch(InputSketch):
    """A sketch that reads dense rows, a bounded piece of them at a time.

    Rows whose squares leave float32's range are multiplied by a power of two before they are
    squared, which changes no bit otherwise, and their sums are divided by it again. So any finite
    row within 1e±30 counts. On a CPU each update is looked at, and most need no factor; on an
    accelerator, where looking is waiting, the first rows choose it, and later ones may be 1e±15 of
    them. On Apple's MPS, without float64, there is none, nor for rows of 16 bits that are not cast:
    of those, up to about 1e16 and down to 1e-18 count.
    """

    def __init__(self, settings: SketchSettings) -> None:
        super().__init__(settings)
        self._row_dtype = torch.float32  # what rows are multiplied in
        # () float64, a power of two for rows before they are squared
        self._scale: Tensor | None = None
        self._may_look = self.device.type == "cpu"  # True: values can be read without waiting
        self._uncast_rows = 0  # of 16 bits, that are multiplied as they are, so many at a time

    def summarize(self, x: Tensor, index: Tensor | None = None) -> SketchUpdate:
        """Return the sums over rows of any float dtype and any strides, read once as a rule."""
        rows = SelectedRows(x, index)
        if self.shift is None and len(rows):
            self._initialize(rows)
        if self._uncast_rows and x.dtype in (torch.bfloat16, torch.float16):
            return self._sum_uncast(rows)
        if self._scale is None and not self._may_look and self.dtype == torch.float64:
            first_rows = rows.first(FIRST_ROWS)
            self._scale = power_of_two(first_rows.to(self.dtype))
        update = self._sum_rows(rows)
        if self._may_look and self._move_scale(rows, update):
            update = self._sum_rows(rows)
        return update

    # -- what each algorithm fills in --------------------------------------------------------------

    @abstractmethod
    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row sum, moment and squared projections of rows (n, d) that are shifted."""

    def _initialize(self, rows: SelectedRows) -> Tensor:
        """Choose the shift, the mean of a few rows; return those rows, shifted and finite."""
        first_rows = rows.first(FIRST_ROWS)
        if not self.center:
            self.shift = first_rows.new_zeros(self.width)
            return first_rows
        self.shift = first_rows.mean(0)
        return first_rows - self.shift

    def _unscaled_moment(self, moment: Tensor, back: Tensor) -> Tensor:
        """Return a moment in true units; `back` () float64 undoes the scale of a row."""
        return moment * back.square()[None]  # one dimension, so that the product is of its dtype

    # -- the loop ----------------------------------------------------------------------------------

    def _sum_rows(self, rows: SelectedRows) -> SketchUpdate:
        update = self._sum(self._chunks(rows, self._scale))
        if self._scale is None:
            return update
        back = 1 / self._scale
        return SketchUpdate(
            rows=update.rows,
            row_sum=update.row_sum * back[None],
            energy=update.energy * back.square(),
            moment=self._unscaled_moment(update.moment, back),
            fresh=update.fresh * back.square(),
        )

    def _sum_uncast(self, rows: SelectedRows) -> SketchUpdate:
        size = self._uncast_rows
        if rows.index is not None:  # they are gathered
            size = min(size, self._chunk_rows(rows.x.dtype))
        update = self._sum(rows.chunks(size))
        # of rows whose products overflow float32 this does too, and makes the sketch void
        energy = torch.where(update.energy.float().isfinite(), update.energy, torch.inf)
        if self.center and self.shift is not None:
            # of the rows as they came, and now of the shifted ones
            shift, row_sum = self.shift.to(self.dtype), update.row_sum.to(self.dtype)
            about_shift = energy - 2 * shift @ row_sum - update.rows * shift.square().sum()
            # what is less than the norms' rounding, of rows that are all alike
            energy = torch.where(about_shift > 4 * _EPSILON * energy, about_shift, 0.0)
        update.energy = energy
        return update

    def _sum(self, chunks: Iterator[Tensor]) -> SketchUpdate:
        updates = [self._sum_chunk(chunk) for chunk in chunks]
        return updates[0] if len(updates) == 1 else self._join(updates)

    def _sum_chunk(self, chunk: Tensor) -> SketchUpdate:
        # Row norms first: a float32 sum over one row is short, the long sum over rows is float64.
        # Norms in float64 would need no scale, at four times the cost of these.
        norms = torch.linalg.vector_norm(chunk, dim=1, dtype=self._row_dtype)
        norms = norms.to(self.dtype)
        energy = torch.dot(norms, norms)
        row_sum, moment, fresh = self._reduce(chunk)
        return SketchUpdate(len(chunk), row_sum, energy, moment, fresh)

    def _move_scale(self, rows: SelectedRows, update: SketchUpdate) -> bool:
        """Choose the scale that these rows need; return True if `update` was made with another."""
        before = 1.0 if self._scale is None else float(self._scale)
        rms = math.sqrt(float(update.energy) / max(1, update.rows))
        if _SAFE_RMS[0] < rms * before < _SAFE_RMS[1]:
            return False
        if len(rows) == 0:
            return False
        largest = [chunk.abs().amax() for chunk in self._chunks(rows, scale=None)]
        scale = power_of_two(torch.stack(largest).to(self.dtype))
        if not math.isfinite(float(scale)) or float(scale) == before:
            return False  # no scale helps
        self._scale = scale
        return True

    def _chunks(self, rows: SelectedRows, scale: Tensor | None) -> Iterator[Tensor]:
        """Yield shifted and scaled rows: `x` itself if it is that already, else bounded copies."""
        as_they_are = rows.index is None and rows.x.dtype == self._row_dtype
        if as_they_are and not self.center and scale is None:
            yield rows.x
            return
        # One dimension, so that 16-bit rows are widened and scaled in one go.
        factor = None if scale is None else scale.to(self._row_dtype)[None]
        for chunk in rows.chunks(self._chunk_rows(self._row_dtype)):
            if self.center and self.shift is not None:
                chunk = chunk.to(self._row_dtype) - self.shift
            if factor is not None:
                chunk = chunk * factor
            yield chunk.to(self._row_dtype)

    def _chunk_rows(self, dtype: torch.dtype) -> int:
        """Return how many rows of this dtype a buffer holds."""
        nbytes = _CHUNK_BYTES if self._may_look else _CHUNK_BYTES_ACCELERATOR
        return max(256, nbytes // (dtype.itemsize * self.width))


def sum_of_rows(chunk: Tensor) -> Tensor:
    """Return the sum (d,) by a product, as sum(0) reads the rows at a fraction of the speed."""
    return torch.mv(chunk.T, chunk.new_ones(len(chunk)))


def power_of_two(values: Tensor) -> Tensor:
    """Return the factor () that brings the largest value to between 1/2 and 1; 1 if all are 0."""
    _, exponent = torch.frexp(values.abs().amax())
    return torch.exp2(-exponent.clamp(-126, 126).to(values.dtype))
