"""The protocol of all sketches, and what they have in common: first moments and the certificate."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from evatune.sketch.spectrum import Certificate, Spectrum, as_energies, fix_signs

_CPU = torch.device("cpu")
# Of the mean's energy: what the rounding of rows to float32 may leave of rows that are all alike.
_ROUNDING = (4 * torch.finfo(torch.float32).eps) ** 2


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return float64 for sums that grow, except on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class SketchSettings:
    """The arguments of all sketches; each kind takes what it needs."""

    width: int  # d, size of a row
    components: int  # k, how many directions will be asked for
    oversampling: int = 16  # columns beyond those, of a randomized sketch
    # work on `x - mean` (covariance) instead of `x`; an exact correction, not a second pass
    center: bool = False
    seed: int = 0  # of the random start, if there is one
    device: torch.device = _CPU  # where the rows live


@dataclass
class SketchUpdate:
    """The sums that one activation adds to a sketch, or to several that share a basis."""

    rows: int
    row_sum: Tensor  # (d,) sum of rows, relative to the sketch's shift
    # () sum of squared norms, relative to the sketch's shift; not finite if any row is not
    energy: Tensor
    # what the algorithm accumulates: Y (l, d), the Gram matrix (d, d) or rows (n, d)
    moment: Tensor
    fresh: Tensor  # (m,) squared projections on the directions known so far


class Sketch(ABC):
    """A summary of what came to one layer, of constant size.

    `add` adds the sums of what came; `refresh` may move the basis towards the data; `spectrum`
    gives the answer at any time. `InputSketch` makes sums of a layer's inputs, `GradientSketch` of
    inputs and gradients; `AdditiveSketch` says how the sums of several processes add up.

    Sums are in true units, in float64.
    """

    # True if no directions of the same number capture more energy of the rows that it has seen.
    optimal: ClassVar[bool] = False
    # Attributes that are all of a sketch, tensors or counts. Sums are zero in one without rows.
    _STATE: ClassVar[tuple[str, ...]] = (
        "shift",
        "count",
        "row_sum",
        "energy",
        "_fresh_count",
        "_fresh",
        "_fresh_energy",
    )

    def __init__(self, settings: SketchSettings) -> None:
        self.width = settings.width
        self.components = min(settings.components, settings.width)
        self.center = settings.center
        self.device = settings.device
        self.dtype = accumulator_dtype(self.device)
        self.shift: Tensor | None = None  # (d,) float32, subtracted from every row when centering
        self.count = 0
        self.row_sum = self._zeros(self.width)
        self.energy = self._zeros()
        self.certificate: Certificate | None = None
        self._start_fresh(0)

    # -- the protocol ------------------------------------------------------------------------------

    def add(self, update: SketchUpdate) -> None:
        """Add an update that this sketch made, or one with the same basis.

        The basis is the same in a clone until either of the two is refreshed.
        """
        self.count += update.rows
        self.row_sum += update.row_sum
        self.energy += update.energy
        self._fresh += update.fresh
        self._fresh_energy += update.energy
        self._fresh_count += update.rows
        self._add_moment(update.moment)

    @property
    def finite(self) -> Tensor:
        """True if every row so far was finite, else the sketch is void; () bool on the device."""
        return torch.isfinite(self.watched_energy)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, as they are now."""
        values = (getattr(self, name) for name in self._STATE)
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    @property
    def watched_energy(self) -> Tensor:
        """A sum () that is not finite if any row was not."""
        return self.energy

    def merge(self, other: Self) -> None:
        """Add another sketch's rows to this one, as if this one had seen them too."""
        if other.shift is None:
            return
        if self.shift is None:
            self.__dict__.update(other.clone().__dict__)
            return
        self._merge_moment(other, self._offset_of(other))
        self._add_first_moments(other)

    def refresh(self) -> Spectrum:
        """Move the basis to the directions so far, start a new certificate, return the spectrum."""
        return self.refresh_together([self])[0]

    @classmethod
    def refresh_together(cls, sketches: Sequence[Self]) -> list[Spectrum]:
        """Refresh many sketches; a kind that saves work on those of equal shape overrides this."""
        answers = [sketch.spectrum() for sketch in sketches]
        for sketch, answer in zip(sketches, answers, strict=True):
            sketch.certificate = answer.certificate
            sketch._start_fresh(sketch._remember(answer.directions))
        return answers

    @abstractmethod
    def spectrum(self) -> Spectrum:
        """Return directions and energies of all rows so far; waits for the device."""

    def clone(self) -> Self:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def state(self) -> dict[str, Tensor]:
        """Return everything that a sketch of the same settings needs to go on from here."""
        state = named_tensors(self, self._STATE)
        if self.certificate is not None:
            state |= self.certificate.state()
        return state

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        set_tensors(self, self._STATE, state)
        self.certificate = Certificate.of_state(state)

    # -- what each algorithm fills in --------------------------------------------------------------

    @abstractmethod
    def _add_moment(self, moment: Tensor) -> None:
        """Add what the algorithm accumulates; see `SketchUpdate.moment`."""

    @abstractmethod
    def _merge_moment(self, other: Self, offset: Tensor) -> None:
        """Add the other's second moment, whose rows are relative to `shift + offset` (d,)."""

    def _remember(self, directions: Tensor) -> int:
        """Keep `directions` (k, d) for the next certificate; return how many it will be about.

        By default none, and there is no certificate.
        """
        return 0

    # -- helpers -----------------------------------------------------------------------------------

    def _zeros(self, *shape: int) -> Tensor:
        """Return zeros for sums that grow."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _offset_of(self, other: Self) -> Tensor:
        """Return the other's shift minus this one's, (d,)."""
        assert self.shift is not None
        assert other.shift is not None
        return (other.shift - self.shift).to(self.dtype)

    def _add_first_moments(self, other: Self) -> None:
        offset = self._offset_of(other)
        crossed = 2 * offset @ other.row_sum
        self.energy += other.energy + crossed + other.count * offset.square().sum()
        self.row_sum += other.row_sum + other.count * offset
        self.count += other.count

    def _start_fresh(self, directions: int) -> None:
        """Start to count rows for a certificate of so many directions."""
        self._fresh = self._zeros(directions)
        self._fresh_energy = self._zeros()
        self._fresh_count = 0

    def _certify(self) -> Certificate | None:
        """Return the certificate of the rows since the last refresh, or if none the one before."""
        return self._certificate_of(*to_cpu([self._fresh, self._fresh_energy]))

    def _certificate_of(self, fresh: Tensor, fresh_energy: Tensor) -> Certificate | None:
        """Return the same, from the sums (m,) and () of these rows on the CPU."""
        rows = self._fresh_count
        if rows == 0 or len(fresh) == 0:
            return self.certificate
        energies = as_energies(fresh[: self.components] / rows)
        return Certificate(energies, float(fresh_energy) / rows, rows)

    def _mean_offset(self) -> Tensor:
        """Return the mean row minus the shift, (d,)."""
        return self.row_sum / max(self.count, 1)

    def _answer(self, directions: Tensor, energies: Tensor) -> Spectrum:
        """Return the spectrum of orthonormal rows (m, d) and summed energies (m,), descending."""
        directions = fix_signs(directions[: self.components].float())
        return self._spectrum_of(*to_cpu([directions, energies, *self._first_sums()]))

    def _first_sums(self) -> list[Tensor]:
        """Return what `_spectrum_of` needs of the sums, on the device."""
        shift = self.row_sum.new_zeros(self.width) if self.shift is None else self.shift
        return [self.energy, self.row_sum, self._fresh, self._fresh_energy, shift]

    def _spectrum_of(
        self,
        directions: Tensor,
        energies: Tensor,
        energy: Tensor,
        row_sum: Tensor,
        fresh: Tensor,
        fresh_energy: Tensor,
        shift: Tensor,
    ) -> Spectrum:
        """Return the spectrum, everything being on the CPU.

        Args:
            directions: (≤ k, d) float32, with signs as all spectra have them. energies: summed.
        """
        count = max(self.count, 1)
        offset = row_sum / count
        # sum of squared norms, about the mean if centered
        total = energy
        if self.center:
            total = energy - self.count * offset.square().sum()
            mean_energy = self.count * (shift + offset).square().sum()
            total = torch.where(total > _ROUNDING * mean_energy, total, 0.0)
            energies = energies if float(total) > 0 else torch.zeros_like(energies)
        return Spectrum(
            # no view of what others have a part of as well
            directions=directions.clone(memory_format=torch.contiguous_format),
            energies=as_energies(energies[: self.components].clamp_min(0) / count),
            total_energy=float(total) / count,
            rows=self.count,
            mean=(shift + offset).float(),
            centered=self.center,
            certificate=self._certificate_of(fresh, fresh_energy),
        )


class InputSketch(Sketch):
    """A sketch of the rows of a layer's inputs alone.

    `summarize` reads an activation and changes nothing but the starting basis of a sketch without
    rows. No method of the hot path (`summarize`, `add`) waits for the device.
    """

    def update(self, x: Tensor, index: Tensor | None = None) -> None:
        """Add the rows of `x` (n, d), or those that `index` (m,) int64 selects."""
        self.add(self.summarize(x, index))

    @abstractmethod
    def summarize(self, x: Tensor, index: Tensor | None = None) -> SketchUpdate:
        """Return the sums over the rows of `x` (n, d), or over those that `index` (m,) selects."""

    def summarize_pieces(self, pieces: Iterator[tuple[Tensor, Tensor | None]]) -> SketchUpdate:
        """Return the sums over an activation in pieces, at least one, each as for `summarize`."""
        total = self.summarize(*next(pieces))
        for piece in pieces:
            total = self._join([total, self.summarize(*piece)])
        return total

    def _join_moments(self, moments: list[Tensor]) -> Tensor:
        total = moments[0]
        for moment in moments[1:]:
            # in place, but where pieces of an activation have scales of their own
            in_place = total.dtype == moment.dtype
            total = total.add_(moment) if in_place else total + moment
        return total

    def _join(self, updates: list[SketchUpdate]) -> SketchUpdate:
        """Return one update from those of an activation's pieces; they add up in float64."""
        row_sums = torch.stack([update.row_sum for update in updates])
        energies = torch.stack([update.energy for update in updates])
        fresh = torch.stack([update.fresh for update in updates])
        return SketchUpdate(
            rows=sum(update.rows for update in updates),
            row_sum=row_sums.sum(0, dtype=self.dtype),
            energy=energies.sum(),
            moment=self._join_moments([update.moment for update in updates]),
            fresh=fresh.sum(0),
        )


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return these tensors on the CPU, with one copy, and one wait, for each device and dtype.

    Those that are there already stay themselves.
    """
    moved = list(tensors)
    indices_by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            indices_by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in indices_by_kind.values():
        flat = torch.cat([tensors[index].flatten() for index in indices]).cpu()
        parts = torch.split(flat, [tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            moved[index] = part.view(tensors[index].shape)
    return moved


def named_tensors(sketch: Sketch, names: Sequence[str]) -> dict[str, Tensor]:
    """Return those attributes that are not None; counts as () int64 on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        value = getattr(sketch, name)
        if isinstance(value, int):
            tensors[name] = torch.tensor(value, dtype=torch.int64, device="cpu")
        elif value is not None:
            tensors[name] = value
    return tensors


def set_tensors(sketch: Sketch, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Set attributes to copies of what `named_tensors` returned."""
    for name in names:
        if isinstance(getattr(sketch, name), int):
            setattr(sketch, name, int(tensors[name]))
        elif name in tensors:
            setattr(sketch, name, tensors[name].to(sketch.device, copy=True))
        else:
            setattr(sketch, name, None)
