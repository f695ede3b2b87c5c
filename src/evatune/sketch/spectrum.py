"""The spectrum of one layer input: leading directions, their energies and what they miss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from evatune.utils.shown import Shown

# By how much a spectrum from a file may miss its own laws. Sketches were seen to miss them by 4e-5
# at most, on steep energies beside a mean a thousand and a sink ten thousand times as large.
_RTOL = 1e-3
# Tensors of a state that hold numbers.
_FACTS = ("facts", "fresh_facts", "input_facts")


@dataclass(frozen=True)
class Certificate:
    """Energy that known directions captured on rows which had no part in finding them.

    The directions are those of the last refresh before these rows came, so the figure is an
    unbiased estimate for *them* and, on average, a low one for the final directions, which saw more
    data.
    """

    # (k,), mean squared projection per fresh row; meaningful only as cumulative sums, since single
    # directions may rotate
    energies: Tensor
    total_energy: float  # mean squared norm per fresh row
    rows: int  # fresh rows the estimate rests on

    def captured(self, rank: int | None = None) -> float:
        """Share in [0, 1] of the fresh rows' energy in the first `rank` directions, or in all."""
        if self.total_energy <= 0:
            return 0.0
        energies = self.energies if rank is None else self.energies[:rank]
        return float(energies.sum(dtype=torch.float64)) / self.total_energy

    def state(self) -> dict[str, Tensor]:
        """Return all of it as named tensors."""
        facts = _facts(self.total_energy, self.rows)
        return {"fresh_energies": self.energies, "fresh_facts": facts}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self | None:
        """Return what `state` described, or None if there is nothing of it."""
        if "fresh_facts" not in state:
            return None
        total, rows = state["fresh_facts"].tolist()
        return cls(state["fresh_energies"].cpu(), total, int(rows))


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a layer's rows, beside a spectrum that is of its gradients."""

    along: Tensor  # (k,), E[(v_j·x)²] for the spectrum's directions; dtype as for `as_energies`
    total: float  # E‖x‖²

    def state(self) -> dict[str, Tensor]:
        """Return all of it as named tensors."""
        return {"input_moments": self.along, "input_facts": _facts(self.total)}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self | None:
        """Return what `state` described, or None if there is nothing of it."""
        if "input_facts" not in state:
            return None
        (total,) = state["input_facts"].tolist()
        return cls(state["input_moments"].cpu(), total)


@dataclass(frozen=True)
class Spectrum(Shown):
    """Leading eigenpairs of the second moment of the rows that entered a layer.

    With `centered` the moment is that of `x - mean` (the covariance), otherwise that of `x` itself.
    With an objective that sees gradients the eigenpairs are of what that says, and `inputs` has the
    moments of x. All tensors live on the CPU and are not shared with any sketch.
    """

    directions: Tensor  # (k, d) float32, orthonormal rows, largest energy first
    # (k,), mean squared projection per row, descending; dtype as for `as_energies`
    energies: Tensor
    total_energy: float  # mean squared norm per row; all d directions together
    rows: int  # how many rows were seen
    mean: Tensor  # (d,) float32, mean row
    centered: bool = False
    certificate: Certificate | None = None
    inputs: InputMoments | None = None  # None: energies and total energy are those of x
    # (k, k) float32, lower triangular: `mixing @ directions` are the rows for which the objective
    # "regression" asks, as they whiten x; None: the directions themselves
    mixing: Tensor | None = None

    def __repr__(self) -> str:
        """Return one line: how many directions, and what they hold."""
        count, width = self.directions.shape
        share = float(self.explained_variance_ratio.sum())
        return (
            f"<Spectrum of {self.rows} rows: {count} of {width} directions,"
            f" {100 * share:.1f} % of the energy>"
        )

    @property
    def explained_variance_ratio(self) -> Tensor:
        """Share of the total energy per direction, shape (k,), float32."""
        if self.total_energy <= 0:
            return torch.zeros_like(self.energies)
        ratio = self.energies.double() / self.total_energy
        return ratio.float()

    @property
    def tail_energy(self) -> float:
        """Mean squared norm per row outside the directions."""
        captured = float(self.energies.sum(dtype=torch.float64))
        return max(0.0, self.total_energy - captured)

    @property
    def participation_ratio(self) -> float:
        """Effective number of directions that the energy is spread over, from 1 to d.

        PR = (tr C)² / tr C², with the eigenvalues of C that are known, and for the others the tail
        energy, spread evenly over what is left of the d directions. That is the widest spread it
        can have, so PR is an upper bound, and a close one where the tail holds little. C is the
        moment that the energies are of: with `centered` the covariance, with gradients theirs.
        0 without energy.
        """
        if self.total_energy <= 0:
            return 0.0
        shares = self.energies.double() / self.total_energy
        count, width = self.directions.shape
        tail = max(0.0, 1 - float(shares.sum()))
        return 1 / (float(shares.square().sum()) + tail**2 / max(1, width - count))

    @property
    def second_moments(self) -> Tensor:
        """`E[(v_j·x)²]` per direction, shape (k,): uncentered, whatever `centered` says."""
        if self.inputs is not None:
            return self.inputs.along
        if not self.centered:
            return self.energies
        return as_energies(self.energies + self._mean_squares)

    @property
    def variances(self) -> Tensor:
        """`Var[v_j·x]` per direction, shape (k,): centered, whatever `centered` says."""
        if self.centered:
            return self.energies
        moments = self.second_moments
        variances = moments - self._mean_squares
        return variances.clamp_min(0).to(moments.dtype)

    @property
    def total_second_moment(self) -> float:
        """`E‖x‖²`: uncentered, whatever `centered` says."""
        if self.inputs is not None:
            return self.inputs.total
        if not self.centered:
            return self.total_energy
        return self.total_energy + _squared_norm(self.mean)

    @property
    def usable(self) -> int:
        """Number of directions that carry energy above the rounding of float32 products."""
        if self.total_energy <= 0:
            return 0
        floor = self.total_energy * 1e-8
        return int((self.energies > floor).sum())

    def state(self) -> dict[str, Tensor]:
        """Return all of it as named tensors."""
        state = {
            "directions": self.directions,
            "energies": self.energies,
            "mean": self.mean,
            "facts": _facts(self.total_energy, self.rows, self.centered),
        }
        for part in (self.certificate, self.inputs):
            if part is not None:
                state |= part.state()
        if self.mixing is not None:
            state["mixing"] = self.mixing
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors, by the names of `state`, without the numbers beside them."""
        return {name: tensor for name, tensor in self.state().items() if name not in _FACTS}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Return what `state` described."""
        total, rows, centered = state["facts"].tolist()
        return cls(
            directions=state["directions"].cpu(),
            energies=state["energies"].cpu(),
            total_energy=total,
            rows=int(rows),
            mean=state["mean"].cpu(),
            centered=bool(centered),
            certificate=Certificate.of_state(state),
            inputs=InputMoments.of_state(state),
            mixing=state["mixing"].cpu() if "mixing" in state else None,
        )

    def contradictions(self, components: int) -> Iterator[str]:
        """Yield what no sketch of `components` directions can have found; for what a file says."""
        shapes = [tuple(tensor.shape) for tensor in (self.directions, self.energies, self.mean)]
        if len(shapes[0]) != 2 or shapes[1:] != [shapes[0][:1], shapes[0][1:]]:
            yield "directions {}, energies {} and mean {} do not fit each other".format(*shapes)
            return
        whole = _is_whole(self.directions) and _is_whole(self.mean)
        if not whole or not _are_energies(self.energies):
            yield "a number is NaN, Inf or of another type than it is written in"
            return
        count, width = shapes[0]
        largest_count = min(components, width)
        if count > largest_count:
            yield f"{count} directions are more than {components} components of {width} inputs"
        directions = self.directions.double()
        identity = torch.eye(count, dtype=torch.float64, device="cpu")
        if bool(((directions @ directions.T - identity).abs() > _RTOL).any()):
            yield "directions are not orthonormal"
        yield from self._contradictions_of_energies()
        yield from self._contradictions_of_inputs(count)
        if self.certificate is not None:
            yield from self._contradictions_of_certificate(self.certificate, largest_count)

    def _contradictions_of_energies(self) -> Iterator[str]:
        energies = self.energies.double()
        negative = bool((energies < 0).any())
        if negative or bool((energies.diff() > _RTOL * energies[:1]).any()):
            yield "energies are negative or rise"
        of_mean = _squared_norm(self.mean)
        # of the mean's square, where energies are of the rows themselves
        rounding = _RTOL * (self.total_energy + (of_mean if self.inputs is None else 0.0))
        if float(energies.sum()) > self.total_energy + rounding:
            yield "energies are more than the total energy"
        if not self.centered and of_mean > self.total_second_moment * (1 + _RTOL):
            yield "the mean has more energy than the rows"
        if self.rows == 0 and self.total_energy > 0:
            yield "there is energy but no row"

    def _contradictions_of_inputs(self, count: int) -> Iterator[str]:
        if self.inputs is not None:
            along = self.inputs.along
            if along.shape != (count,) or not _are_energies(along) or bool((along < 0).any()):
                yield "the moments of the inputs are none of these directions"
            elif float(along.double().sum()) > self.inputs.total * (1 + _RTOL):
                yield "the inputs have more energy along the directions than in all"
        if self.mixing is not None and (
            self.mixing.shape != (count, count)
            or not _is_whole(self.mixing)
            or bool(self.mixing.triu(1).any())
        ):
            yield "the mixing of the directions is not lower triangular"

    def _contradictions_of_certificate(
        self, certificate: Certificate, components: int
    ) -> Iterator[str]:
        energies = certificate.energies
        per_component = energies.ndim == 1 and len(energies) <= components
        if not per_component or not _are_energies(energies):
            yield "the certificate does not hold an energy per component"
            return
        captured = float(energies.sum(dtype=torch.float64))
        negative = bool((energies < 0).any())
        if negative or captured > certificate.total_energy * (1 + _RTOL):
            yield "the certificate has negative energies, or more than the total"
        if certificate.rows > self.rows:
            yield f"the certificate rests on {certificate.rows} rows of {self.rows}"
        # Centered energies are about two different means, and say nothing about each other.
        if not self.centered:
            fresh = certificate.total_energy * certificate.rows
            if fresh > self.total_energy * self.rows * (1 + _RTOL):
                yield "the certificate's rows have more energy than all rows"

    @property
    def _mean_squares(self) -> Tensor:
        """Squares of the mean row's projections on the directions, (k,) float64."""
        return (self.directions.double() @ self.mean.double()).square()


def as_energies(values: Tensor) -> Tensor:
    """Return the energies (k,) of a record: float32 unless the largest is far from its range.

    That range is 1e±38; energies beyond 1e-30 … 1e38 stay as they are.
    """
    largest = float(values.amax()) if len(values) else 0.0
    return values.float() if largest == 0 or 1e-30 < largest < 1e38 else values


def empty(width: int, centered: bool = False) -> Spectrum:
    """Return the spectrum of a layer that saw nothing: no directions, no energy."""
    return Spectrum(
        directions=torch.zeros(0, width, dtype=torch.float32, device="cpu"),
        energies=torch.zeros(0, dtype=torch.float32, device="cpu"),
        total_energy=0.0,
        rows=0,
        mean=torch.zeros(width, dtype=torch.float32, device="cpu"),
        centered=centered,
    )


def fix_signs(directions: Tensor) -> Tensor:
    """Flip rows of (…, k, d) whose largest entry in magnitude, or the first such, is negative."""
    if directions.numel() == 0:
        return directions
    largest = directions.abs().argmax(dim=-1, keepdim=True)
    pivot = directions.gather(-1, largest)
    return torch.where(pivot < 0, -directions, directions)


def _facts(*values: float) -> Tensor:
    """Return numbers as (n,) float64 on the CPU."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _squared_norm(vector: Tensor) -> float:
    return float(vector.double().square().sum())


def _is_whole(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def _are_energies(tensor: Tensor) -> bool:
    """Return True if these are finite and of a dtype that `as_energies` gives."""
    known = tensor.dtype in (torch.float32, torch.float64)
    return known and bool(tensor.isfinite().all())
