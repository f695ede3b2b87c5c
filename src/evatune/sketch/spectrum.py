"""What one layer input looks like: its leading directions, their energies and what they miss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

# By how much a spectrum from a file may miss its own laws. Sketches were seen to miss them by 4e-5
# at most, on steep energies beside a mean a thousand and a sink ten thousand times as large.
_RTOL = 1e-3


@dataclass(frozen=True)
class Certificate:
    """Energy that known directions captured on rows which had no part in finding them.

    The directions are those of the last refresh before these rows came, so the figure is an
    unbiased estimate for *them* and, on average, a low one for the final directions, which saw more
    data.
    """

    energies: Tensor  # (k,), mean squared projection per fresh row, cumulative use only
    total_energy: float  # mean squared norm per fresh row
    rows: int  # fresh rows the estimate rests on

    def captured(self, rank: int | None = None) -> float:
        """Share in [0, 1] of the fresh rows' energy inside the first `rank` directions (default:
        all)."""
        if self.total_energy <= 0:
            return 0.0
        kept = self.energies if rank is None else self.energies[:rank]
        return float(kept.sum(dtype=torch.float64)) / self.total_energy

    def state(self) -> dict[str, Tensor]:
        """All of it as named tensors."""
        facts = _facts(self.total_energy, self.rows)
        return {"fresh_energies": self.energies, "fresh_facts": facts}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self | None:
        """What `state` described, or None where there is nothing of it."""
        if "fresh_facts" not in state:
            return None
        total, rows = state["fresh_facts"].tolist()
        return cls(state["fresh_energies"].cpu(), total, int(rows))


@dataclass(frozen=True)
class Spectrum:
    """Leading eigenpairs of the second moment of the rows that entered a layer.

    With `centered` the moment is that of `x - mean` (the covariance), otherwise that of `x` itself.
    All tensors live on the CPU and are not shared with any sketch.
    """

    directions: Tensor  # (k, d) float32, orthonormal rows, largest energy first
    # (k,), mean squared projection per row, descending; dtype as for `as_energies`
    energies: Tensor
    total_energy: float  # mean squared norm per row; all d directions together
    rows: int  # how many rows were seen
    mean: Tensor  # (d,) float32, mean row
    centered: bool = False
    certificate: Certificate | None = field(default=None)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """Share of the total energy per direction, shape (k,), float32."""
        if self.total_energy <= 0:
            return torch.zeros_like(self.energies)
        return (self.energies.double() / self.total_energy).float()

    @property
    def tail_energy(self) -> float:
        """Mean squared norm per row outside the directions."""
        return max(0.0, self.total_energy - float(self.energies.sum(dtype=torch.float64)))

    @property
    def second_moments(self) -> Tensor:
        """`E[(v_j·x)²]` per direction, shape (k,): uncentred, whatever `centered` says."""
        return as_energies(self.energies + self._mean_squares) if self.centered else self.energies

    @property
    def variances(self) -> Tensor:
        """`Var[v_j·x]` per direction, shape (k,): centred, whatever `centered` says."""
        if self.centered:
            return self.energies
        return (self.energies - self._mean_squares).clamp_min(0).to(self.energies.dtype)

    @property
    def total_second_moment(self) -> float:
        """`E‖x‖²`: uncentred, whatever `centered` says."""
        return self.total_energy + (
            float(self.mean.double().square().sum()) if self.centered else 0.0
        )

    @property
    def usable(self) -> int:
        """Number of directions that carry energy above the rounding of float32 products."""
        floor = self.total_energy * 1e-8
        return int((self.energies > floor).sum()) if self.total_energy > 0 else 0

    def state(self) -> dict[str, Tensor]:
        """All of it as named tensors."""
        facts = _facts(self.total_energy, self.rows, self.centered)
        state = {
            "directions": self.directions,
            "energies": self.energies,
            "mean": self.mean,
            "facts": facts,
        }
        if self.certificate is not None:
            state |= self.certificate.state()
        return state

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self:
        """What `state` described."""
        total, rows, centered = state["facts"].tolist()
        return cls(
            directions=state["directions"].cpu(),
            energies=state["energies"].cpu(),
            total_energy=total,
            rows=int(rows),
            mean=state["mean"].cpu(),
            centered=bool(centered),
            certificate=Certificate.of_state(state),
        )

    def contradictions(self, components: int) -> Iterator[str]:
        """Yield what no sketch of `components` directions can have found; for what a file says."""
        shapes = [tuple(tensor.shape) for tensor in (self.directions, self.energies, self.mean)]
        if len(shapes[0]) != 2 or shapes[1:] != [shapes[0][:1], shapes[0][1:]]:
            yield "directions {}, energies {} and mean {} do not fit each other".format(*shapes)
            return
        if not (
            _is_whole(self.directions) and _is_whole(self.mean) and _are_energies(self.energies)
        ):
            yield "a number is NaN, Inf or of another type than it is written in"
            return
        count, width = shapes[0]
        directions, energies = self.directions.double(), self.energies.double()
        if count > min(components, width):
            yield f"{count} directions are more than {components} components of {width} inputs"
        unit = torch.eye(count, dtype=torch.float64, device="cpu")
        if bool(((directions @ directions.T - unit).abs() > _RTOL).any()):
            yield "directions are not orthonormal"
        if bool((energies < 0).any() or (energies.diff() > _RTOL * energies[:1]).any()):
            yield "energies are negative or rise"
        of_mean = float(self.mean.double().square().sum())
        if float(energies.sum()) > self.total_energy + _RTOL * (self.total_energy + of_mean):
            yield "energies are more than the total energy"
        if not self.centered and of_mean > self.total_energy * (1 + _RTOL):
            yield "the mean has more energy than the rows"
        if self.rows == 0 and self.total_energy > 0:
            yield "there is energy but no row"
        if self.certificate is not None:
            yield from self._contradictions_of(self.certificate, min(components, width))

    def _contradictions_of(self, certificate: Certificate, components: int) -> Iterator[str]:
        energies = certificate.energies
        if energies.ndim != 1 or len(energies) > components or not _are_energies(energies):
            yield "the certificate does not hold an energy per component"
            return
        captured = float(energies.sum(dtype=torch.float64))
        if bool((energies < 0).any()) or captured > certificate.total_energy * (1 + _RTOL):
            yield "the certificate has negative energies, or more than the total"
        if certificate.rows > self.rows:
            yield f"the certificate rests on {certificate.rows} rows of {self.rows}"
        fresh = certificate.total_energy * certificate.rows
        # Centred energies are about two different means, and say nothing about each other.
        if not self.centered and fresh > self.total_energy * self.rows * (1 + _RTOL):
            yield "the certificate's rows have more energy than all rows"

    @property
    def _mean_squares(self) -> Tensor:
        """(k,) float64."""
        return (self.directions.double() @ self.mean.double()).square()


def as_energies(values: Tensor) -> Tensor:
    """The energies (k,) of a record: float32, or as they are where the largest is far from 1e±38,
    float32's range."""
    largest = float(values.amax()) if len(values) else 0.0
    return values.float() if largest == 0 or 1e-30 < largest < 1e38 else values


def _facts(*values: float) -> Tensor:
    """(n,) float64 on the CPU."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def empty(width: int, centered: bool = False) -> Spectrum:
    """The spectrum of a layer that saw nothing: no directions, no energy."""
    nothing = torch.zeros(0, width, dtype=torch.float32, device="cpu")
    return Spectrum(nothing, nothing.new_zeros(0), 0.0, 0, nothing.new_zeros(width), centered)


def _is_whole(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def _are_energies(tensor: Tensor) -> bool:
    """Return whether these are finite and of a dtype that `as_energies` gives."""
    known = tensor.dtype in (torch.float32, torch.float64)
    return known and bool(tensor.isfinite().all())


def fix_signs(directions: Tensor) -> Tensor:
    """Flip each row of (k, d) so that its entry of largest magnitude (the first, in a tie) is
    positive."""
    if directions.numel() == 0:
        return directions
    pivot = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return torch.where(pivot < 0, -directions, directions)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in radians between the row spaces of two orthonormal bases.

    Args:
        a: (p, d) with orthonormal rows. b: (q, d) likewise.

    Returns:
        (min(p, q),) float64, ascending. Computed from sines where the cosine is near one
        (Björck & Golub 1973), so tiny angles are not rounded to 1e-8.
    """
    small, large = (a.double(), b.double()) if len(a) <= len(b) else (b.double(), a.double())
    cosines = torch.linalg.svdvals(small @ large.T).clamp(max=1.0)  # descending, so angles ascend
    sines = torch.linalg.svdvals(small - small @ large.T @ large).clamp(max=1.0).flip(0)
    return torch.where(cosines > 0.7, torch.asin(sines), torch.acos(cosines))


def captured_energy(directions: Tensor, rows: Tensor) -> float:
    """Share of `‖rows‖²` inside the span of orthonormal `directions` (k, d); `rows` is (n, d)."""
    rows = rows.double()
    total = float(rows.square().sum())
    return float((rows @ directions.double().T).square().sum()) / total if total > 0 else 0.0
