"""What the three sketches have in common: one protocol, the row loop and the first two moments."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.spectrum import Certificate, Spectrum, as_energies, fix_signs

# Casting, gathering and centring go through buffers of this size instead of a second copy of the
# activation.
_CHUNK_BYTES = 8 << 20
# Rows that choose a newborn sketch's shift and basis. Half as many cost the Nyström sketch a third
# of a per cent of the energy in the worst layer of MiniLM, sixteen batches later.
_FIRST_ROWS = 1024
# Root mean squares of rows between which float32 products neither overflow nor lose small
# directions.
_SAFE_RMS = (2.0**-40, 2.0**40)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums that grow, except on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class SketchUpdate:
    """What one activation adds to a sketch. Sums only, so a digest can be added to several
    sketches."""

    rows: int
    row_sum: Tensor  # (d,) sum of rows, relative to the sketch's shift
    # () sum of squared norms, relative to the sketch's shift; not finite if any row is not
    energy: Tensor
    # what the algorithm accumulates: Y (l, d), the Gram matrix (d, d) or rows (n, d)
    moment: Tensor
    fresh: Tensor  # (m,) squared projections on the directions known so far


class Sketch(ABC):
    """A summary of the rows of one layer input, of constant size.

    `digest` reads an activation and changes nothing but a newborn sketch's starting basis; `add`
    adds a digest; `refresh` may move the basis towards the data; `spectrum` gives the answer at any
    time. No method of the hot path (`digest`, `add`) waits for the device.

    Sums are in true units, in float64. Rows whose squares leave float32's range are multiplied by a
    power of two before they are squared, which changes no bit otherwise, and what they add is
    divided by it again. So any finite row within 1e±30 counts. On a CPU each digest is looked at,
    and most need no factor; on an accelerator, where looking is waiting, the first rows choose it,
    and later ones may be 1e±15 of them. On Apple's MPS, without float64, there is none.

    Sketches of several processes add up: `start` is what the sums refer to, `change_basis` changes
    that, and the `sums` of sketches with equal starts are those of all their rows together.
    """

    linear: ClassVar[bool] = True  # whether the sums of sketches with equal starts add up
    # Attributes, tensors or counts. Every sum is zero in a sketch without rows.
    _START: ClassVar[tuple[str, ...]] = ("shift",)
    _SUMS: ClassVar[tuple[str, ...]] = (
        "count",
        "row_sum",
        "energy",
        "_fresh_count",
        "_fresh",
        "_fresh_energy",
    )

    def __init__(self, width: int, components: int, *, center: bool, device: torch.device) -> None:
        self.width = width
        self.components = min(components, width)
        self.center = center
        self.device = device
        self.dtype = accumulator_dtype(device)
        self._row_dtype = torch.float32  # what rows are multiplied in
        self.shift: Tensor | None = None  # (d,) float32, subtracted from every row when centring
        self.count = 0
        self.row_sum = torch.zeros(width, dtype=self.dtype, device=device)
        self.energy = torch.zeros((), dtype=self.dtype, device=device)
        self.certificate: Certificate | None = None
        # () float64, a power of two for rows before they are squared
        self._scale: Tensor | None = None
        self._may_look = device.type == "cpu"  # at values, for nothing
        self._start_fresh(0)

    # -- the protocol ------------------------------------------------------------------------------

    def update(self, x: Tensor, index: Tensor | None = None) -> None:
        """Add the rows of `x` (n, d), or those that `index` (m,) int64 selects."""
        self.add(self.summarize(x, index))

    def summarize(self, x: Tensor, index: Tensor | None = None) -> SketchUpdate:
        """Summarise the rows of `x` (n, d), any float dtype, any strides; at most one pass over the
        rows."""
        if self.shift is None and (len(x) if index is None else len(index)):
            self._begin(x, index)
        if self._scale is None and not self._may_look and self.dtype == torch.float64:
            self._scale = power_of_two(_finite(self._head(x, index, _FIRST_ROWS)).to(self.dtype))
        summarize = self._digest(x, index)
        if self._may_look and self._move_scale(x, index, summarize):
            summarize = self._digest(x, index)
        return summarize

    def summarize_pieces(self, pieces: Iterator[tuple[Tensor, Tensor | None]]) -> SketchUpdate:
        """Summarise an activation that comes in pieces, at least one, each as for `digest`."""
        total = self.summarize(*next(pieces))
        for piece in pieces:
            total = self._join([total, self.summarize(*piece)])
        return total

    def add(self, summarize: SketchUpdate) -> None:
        """Add a digest of this sketch, or of one it was cloned from since the last refresh."""
        self.count += summarize.rows
        self.row_sum += summarize.row_sum
        self.energy += summarize.energy
        self._fresh += summarize.fresh
        self._fresh_energy += summarize.energy
        self._fresh_count += summarize.rows
        self._add(summarize)

    @property
    def finite(self) -> Tensor:
        """() bool on the device: whether every row so far was finite. Otherwise the sketch is
        worthless."""
        return torch.isfinite(self.energy)

    def merge(self, other: Self) -> None:
        """Add another sketch's rows to this one, as if this one had seen them too."""
        if other.shift is None:
            return
        if self.shift is None:
            self.__dict__.update(other.clone().__dict__)
            return
        self._merge(other, self._offset_of(other))
        self._add_first_moments(other)

    def refresh(self) -> Spectrum:
        """Move the basis to what the data so far suggests, start a new certificate, return the
        spectrum."""
        return self.refresh_all([self])[0]

    @classmethod
    @abstractmethod
    def refresh_all(cls, sketches: Sequence[Self]) -> list[Spectrum]:
        """`refresh` of many sketches, those of equal shape together where that saves work."""

    @abstractmethod
    def spectrum(self) -> Spectrum:
        """Directions and energies of everything absorbed so far. Waits for the device; changes
        nothing."""

    def clone(self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    def sibling(self) -> Self:
        """A sketch without rows that starts from this one's basis and shift.

        What it is fed can be merged back exactly, as long as neither side refreshes in between.
        """
        other = self.clone()
        other._forget()
        return other

    # -- several processes, and files --------------------------------------------------------------

    def start(self) -> dict[str, Tensor]:
        """What the sums refer to: shift and basis, as far as there are any, and how many directions
        are known."""
        return self._named(self._START) | {"known_directions": _count(len(self._fresh))}

    def set_basis(self, start: Mapping[str, Tensor]) -> None:
        """Drop every row, and go on from the `start` of another sketch of this size."""
        self._set(self._START, start)
        self._forget()
        self._start_fresh(int(start["known_directions"]))

    def leading(self, count: int) -> Tensor:
        """The first `count` directions of the last refresh, (count, d) float32 on the CPU, as far
        as `start` tells them."""
        return torch.zeros(0, self.width, dtype=torch.float32, device="cpu")

    def change_basis(self, start: Mapping[str, Tensor]) -> None:
        """Keep every row, as far as this sketch can tell, with sums that refer to another sketch's
        `start`.

        For sketches that have not been refreshed yet.
        """
        rows = self.clone()
        self.set_basis(start)
        self.merge(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(value.nbytes for value in self._values(self._SUMS) if isinstance(value, Tensor))

    def sums(self) -> Tensor:
        """(m,) all sums in one row of `dtype`, for adding up over sketches with equal starts."""
        parts = [
            torch.as_tensor(value, dtype=self.dtype, device=self.device)
            for value in self._values(self._SUMS)
        ]
        return torch.cat([part.flatten() for part in parts])

    def set_sums(self, sums: Tensor) -> None:
        """Replace all sums by those of a row (m,) as `sums` gives it."""
        start = 0
        for name, value in zip(self._SUMS, self._values(self._SUMS), strict=True):
            size = value.numel() if isinstance(value, Tensor) else 1
            part = sums[start : start + size].to(self.device)
            start += size
            setattr(
                self,
                name,
                (
                    part.reshape(value.shape).clone()
                    if isinstance(value, Tensor)
                    else round(float(part))
                ),
            )

    def state(self) -> dict[str, Tensor]:
        """Everything a sketch of the same settings needs to go on from here."""
        state = self._named((*self._START, *self._SUMS))
        return state | (self.certificate.state() if self.certificate is not None else {})

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._set(self._START, state)
        self._set(self._SUMS, state)
        self.certificate = Certificate.of_state(state)

    def _values(self, names: Sequence[str]) -> list[Tensor | int]:
        return [getattr(self, name) for name in names]

    def _named(self, names: Sequence[str]) -> dict[str, Tensor]:
        known = zip(names, self._values(names), strict=True)
        return {
            name: _count(value) if isinstance(value, int) else value
            for name, value in known
            if value is not None
        }

    def _set(self, names: Sequence[str], values: Mapping[str, Tensor]) -> None:
        for name in names:
            value, now = values.get(name), getattr(self, name)
            if isinstance(now, int):
                setattr(self, name, int(values[name]))
            else:
                setattr(self, name, None if value is None else value.to(self.device, copy=True))

    # -- what each algorithm fills in --------------------------------------------------------------

    @abstractmethod
    def _reduce(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row sum, moment, squared projections) of float32 rows (n, d) that are already
        shifted."""

    @abstractmethod
    def _add(self, summarize: SketchUpdate) -> None: ...

    def _forget(self) -> None:
        """Drop every sum; subclasses drop theirs too."""
        self.count = 0
        self.row_sum.zero_()
        self.energy.zero_()
        self.certificate = None
        self._start_fresh(len(self._fresh))

    @abstractmethod
    def _merge(self, other: Self, offset: Tensor) -> None:
        """Add the other's second moment, whose rows are relative to `shift + offset` (d,)."""

    def _digest(self, x: Tensor, index: Tensor | None) -> SketchUpdate:
        parts = [self._summarize_chunk(chunk) for chunk in self._chunks(x, index, self._scale)]
        summarize = parts[0] if len(parts) == 1 else self._join(parts)
        if self._scale is None:
            return summarize
        back = 1 / self._scale
        return SketchUpdate(
            summarize.rows,
            summarize.row_sum * back[None],
            summarize.energy * back.square(),
            self._unscaled_moment(summarize.moment, back),
            summarize.fresh * back.square(),
        )

    def _unscaled_moment(self, moment: Tensor, back: Tensor) -> Tensor:
        """What the rows add, in true units; `back` () float64 takes a scaled row back to its own
        length."""
        return moment * back.square()[None]  # one dimension, so that the product is of its dtype

    def _move_scale(self, x: Tensor, index: Tensor | None, summarize: SketchUpdate) -> bool:
        """Choose the scale that these rows need; true if the digest was made with another."""
        before = 1.0 if self._scale is None else float(self._scale)
        rms = math.sqrt(float(summarize.energy) / max(1, summarize.rows))
        if _SAFE_RMS[0] < rms * before < _SAFE_RMS[1]:
            return False
        chunks = [chunk.abs().amax() for chunk in self._chunks(x, index) if len(chunk)]
        scale = power_of_two(torch.stack(chunks).to(self.dtype)) if chunks else None
        if scale is None or not math.isfinite(float(scale)) or float(scale) == before:
            return False  # no scale helps
        self._scale = scale
        return True

    def _summarize_chunk(self, chunk: Tensor) -> SketchUpdate:
        # Row norms first: a float32 sum over one row is short, the long sum over rows is float64.
        # Norms in float64 would need no scale, at four times the cost of these.
        energy = torch.linalg.vector_norm(chunk, dim=1).to(self.dtype).square_().sum()
        row_sum, moment, fresh = self._reduce(chunk)
        return SketchUpdate(len(chunk), row_sum, energy, moment, fresh)

    def _join(self, parts: list[SketchUpdate]) -> SketchUpdate:
        """One digest from those of an activation's chunks; their sums add up in float64."""
        return SketchUpdate(
            sum(part.rows for part in parts),
            torch.stack([part.row_sum for part in parts]).sum(0, dtype=self.dtype),
            torch.stack([part.energy for part in parts]).sum(),
            self._join_moments([part.moment for part in parts]),
            torch.stack([part.fresh for part in parts]).sum(0),
        )

    def _join_moments(self, moments: list[Tensor]) -> Tensor:
        total = moments[0]
        # in place, but where pieces of an activation have scales of their own
        for moment in moments[1:]:
            total = total.add_(moment) if total.dtype == moment.dtype else total + moment
        return total

    def _begin(self, x: Tensor, index: Tensor | None) -> Tensor:
        """First sight of data. Chooses the shift, the mean of a few rows; returns those rows,
        shifted, finite."""
        head = _finite(self._head(x, index, _FIRST_ROWS))
        self.shift = head.mean(0) if self.center else head.new_zeros(self.width)
        return head - self.shift if self.center else head

    # -- helpers -----------------------------------------------------------------------------------

    def _offset_of(self, other: Self) -> Tensor:
        """(d,) the other's shift minus this one's."""
        assert self.shift is not None
        assert other.shift is not None
        return (other.shift - self.shift).to(self.dtype)

    def _add_first_moments(self, other: Self) -> None:
        offset = self._offset_of(other)
        self.energy += (
            other.energy + 2 * offset @ other.row_sum + other.count * offset.square().sum()
        )
        self.row_sum += other.row_sum + other.count * offset
        self.count += other.count

    def _chunks(
        self, x: Tensor, index: Tensor | None, scale: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Shifted and scaled rows: `x` itself where that is what it already is, else bounded
        copies."""
        n = len(x) if index is None else len(index)
        if index is None and x.dtype == self._row_dtype and not self.center and scale is None:
            yield x
            return
        step = max(256, _CHUNK_BYTES // (self._row_dtype.itemsize * self.width))
        # One dimension, so that 16-bit rows are widened and scaled in one go.
        factor = None if scale is None else scale.to(self._row_dtype)[None]
        # once even for no rows, so that a digest always has its shapes
        for start in range(0, max(n, 1), step):
            chunk = (
                x[start : start + step]
                if index is None
                else x.index_select(0, index[start : start + step])
            )
            if self.shift is not None and self.center:
                chunk = chunk.to(self._row_dtype) - self.shift
            yield (chunk if factor is None else chunk * factor).to(self._row_dtype)

    @staticmethod
    def _row_sum(chunk: Tensor) -> Tensor:
        """(d,) as a product and not as sum(0), which reads the rows at a fraction of the speed."""
        return torch.mv(chunk.T, chunk.new_ones(len(chunk)))

    def _head(self, x: Tensor, index: Tensor | None, limit: int) -> Tensor:
        """At most `limit` unshifted float32 rows, evenly spread over the activation."""
        n = len(x) if index is None else len(index)
        stride = max(1, -(-n // limit))
        picked = x[::stride] if index is None else x.index_select(0, index[::stride])
        return picked.float()

    def _start_fresh(self, columns: int) -> None:
        self._fresh = torch.zeros(columns, dtype=self.dtype, device=self.device)
        self._fresh_energy = torch.zeros((), dtype=self.dtype, device=self.device)
        self._fresh_count = 0

    def _certify(self) -> Certificate | None:
        """The certificate of the rows since the last refresh, or the one before if there were
        none."""
        rows = self._fresh_count
        if rows == 0 or len(self._fresh) == 0:
            return self.certificate
        energies = as_energies((self._fresh[: self.components] / rows).cpu())
        return Certificate(energies, float(self._fresh_energy) / rows, rows)

    def _mean_offset(self) -> Tensor:
        """(d,) mean row minus the shift."""
        return self.row_sum / max(self.count, 1)

    def _moved_energy(self, offset: Tensor) -> Tensor:
        """() sum of squared norms about `shift + offset` when `offset` is the mean offset."""
        return (self.energy - self.count * offset.square().sum()).clamp_min(0)

    def _answer(self, directions: Tensor, energies: Tensor) -> Spectrum:
        """Spectrum from orthonormal rows (m, d) and summed energies (m,), both in descending
        order."""
        k = self.components
        offset = self._mean_offset()
        count = max(self.count, 1)
        total = self._moved_energy(offset) if self.center else self.energy
        shift = offset.new_zeros(()) if self.shift is None else self.shift
        return Spectrum(
            directions=fix_signs(directions[:k].float().cpu()).contiguous(),
            energies=as_energies((energies[:k].clamp_min(0) / count).cpu()),
            total_energy=float(total) / count,
            rows=self.count,
            mean=(shift + offset).float().cpu(),
            centered=self.center,
            certificate=self._certify(),
        )


def _finite(rows: Tensor) -> Tensor:
    """The rows with zeros for NaN and Inf."""
    return torch.nan_to_num(rows, posinf=0.0, neginf=0.0)


def power_of_two(values: Tensor) -> Tensor:
    """() the factor that brings the largest of `values` to between 1/2 and 1; 1 if all are zero."""
    _, exponent = torch.frexp(values.abs().amax())
    return torch.exp2(-exponent.clamp(-126, 126).to(values.dtype))


def _count(value: int) -> Tensor:
    """() int64 on the CPU."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")
