"""Length of the rows of A: the formulas behind `initialize(scale=...)`, in their one home.

And what they mean for the learning rate: κ, see `step_ratio`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.choices import SCALES, Scale, require_choice
from evatune.scaling.random_rows import DEFAULT_LENGTH, seeded_generator
from evatune.sketch.spectrum import Spectrum, fix_signs

# A direction along which the input hardly varies would be blown up without bound by 1/σ.
_SIGMA_FLOOR = 1e-3
# Share of the whole energy below which a direction is whitened no further. `Spectrum.usable` counts
# directions from 1e-8 on, where float32 products leave no digit of an energy; here two are left.
_ENERGY_FLOOR = 1e-6


def pad_with_random_rows(rows: Tensor, rank: int, scale: Scale, *, seed: int) -> Tensor:
    """Return `rank` rows: those given and random ones for the rest, orthogonal to all others.

    They are as long as PEFT's own where the scale matches those, for what few rows showed says
    nothing about the energy along other directions; else as the given ones on average.

    For experts to which too few tokens were routed, and gradients in few directions.
    """
    if len(rows) >= rank:
        return rows
    generator = seeded_generator(seed)
    shape = rows.shape[1], rank - len(rows)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
    orthonormal = torch.linalg.qr(torch.cat([rows.T, drawn], dim=1))[0]
    length = _length_of_random_rows(rows.norm(dim=1), scale)
    return torch.cat([rows, fix_signs(orthonormal[:, len(rows) :].T) * length])


def scaled_rows(spectrum: Spectrum, rank: int, scale: Scale) -> Tensor:
    """Return the matrix A of a layer, (rank, d) float32, and no view of the spectrum.

    It has fewer rows where fewer directions have energy.

    See `evatune.initialize` for the formula of each `scale`.
    """
    lengths = _row_lengths(spectrum, rank, scale)
    count = len(lengths)
    directions = spectrum.directions[:count].double()
    if _uses_regression_rows(spectrum, scale):
        rows = _regression_rows(spectrum, count)
        directions = rows / rows.norm(dim=1, keepdim=True)
    return (directions * lengths[:, None]).float()


def step_ratio(spectrum: Spectrum, rank: int, scale: Scale, usual_rank: int) -> float:
    """Return κ of a layer: how much more B's first Adam steps change its output than LoRA's would.

    With B = 0, C = E[x xᵀ] and a step of ±η in every entry of B, E‖Δy‖² grows with tr(A C Aᵀ), so

        κ = √(tr(A C Aᵀ) / (usual_rank · tr C / (3d)))

    where the divisor is what PEFT's default A of `usual_rank` rows has in expectation. The factor
    α/r is that of LoRA, which evatune keeps in every layer whatever its rank.

    Args:
        rank: of the layer, at least 1. usual_rank: what uniform LoRA would give it.

    Returns:
        A number above 0; for "paper" √(3·d·c / usual_rank), c the share of the energy in `rank`
        directions. NaN for an input without energy.
    """
    lengths = _row_lengths(spectrum, rank, scale)
    count, width = len(lengths), spectrum.directions.shape[1]
    moments = spectrum.second_moments[:count].double()
    energies = moments
    if _uses_regression_rows(spectrum, scale):
        # of rows of length 1
        energies = _regression_rows(spectrum, count).square().sum(1).reciprocal()
    energy = float((lengths.square() * energies).sum())
    if count < rank:  # see `pad_with_random_rows`
        rest = spectrum.total_second_moment - float(moments.sum())
        along_others = max(0.0, rest) / max(1, width - count)
        energy += (rank - count) * _length_of_random_rows(lengths, scale) ** 2 * along_others
    default = usual_rank * _default_energy(spectrum)
    return (energy / default) ** 0.5 if default > 0 else float("nan")


def _row_lengths(spectrum: Spectrum, rank: int, scale: Scale) -> Tensor:
    """Return the length of every row of A, (rank,) float64; fewer where fewer have energy."""
    require_choice("scale", scale, SCALES)
    rank = min(rank, spectrum.usable)
    moments = spectrum.second_moments[:rank].double()
    if _uses_regression_rows(spectrum, scale):
        lengths: Tensor = _regression_rows(spectrum, rank).norm(dim=1)
        if scale == "whiten":
            return lengths
        lengths *= _default_energy(spectrum) ** 0.5
        return lengths.clamp_max(1)
    if scale == "whiten":
        sigma = spectrum.variances[:rank].double().sqrt()
        return 1 / torch.maximum(sigma, _SIGMA_FLOOR * moments.sqrt())
    if scale == "paper":
        return torch.ones_like(moments)
    if scale == "matched":
        lengths = (rank * _default_energy(spectrum) / moments.sum()).sqrt().expand(rank)
    else:
        floor = _ENERGY_FLOOR * spectrum.total_second_moment
        lengths = (_default_energy(spectrum) / moments.clamp_min(floor)).sqrt()
    # Where the energy of an input is that of tokens without a gradient, such as attention sinks,
    # the directions of gradients avoid it, and to match it would make all other tokens' steps long.
    return lengths if spectrum.inputs is None else lengths.clamp_max(1)


def _uses_regression_rows(spectrum: Spectrum, scale: Scale) -> bool:
    """Return whether the rows at this scale are those of a regression, which whiten the input."""
    return spectrum.mixing is not None and scale in ("whiten", "whiten-matched")


def _regression_rows(spectrum: Spectrum, count: int) -> Tensor:
    """Return the rows of a regression, (count, d) float64: each sees an energy of 1, E[(a·x)²]."""
    assert spectrum.mixing is not None
    return spectrum.mixing[:count, :count].double() @ spectrum.directions[:count].double()


def _length_of_random_rows(lengths: Tensor, scale: Scale) -> float:
    """Return the length of random rows beside directions whose rows have these lengths, (n,)."""
    if scale in ("matched", "whiten-matched"):
        return DEFAULT_LENGTH
    return float(lengths.mean()) if len(lengths) else 1.0


def _default_energy(spectrum: Spectrum) -> float:
    """Return tr C / (3d): E[(a·x)²] of one row `a` of PEFT's default A, in expectation."""
    return spectrum.total_second_moment / (3 * spectrum.directions.shape[1])
