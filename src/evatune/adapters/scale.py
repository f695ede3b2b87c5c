"""Length of the rows of A: the formulas behind `initialize(scale=...)`, in their one home."""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.errors import ConfigError
from evatune.sketch.spectrum import Spectrum, fix_signs

SCALES = ("paper", "whiten", "matched")
# A direction along which the input hardly varies would be blown up without bound by 1/σ.
_SIGMA_FLOOR = 1e-3


def completed(rows: Tensor, rank: int, *, seed: int) -> Tensor:
    """Return `rank` rows: those given and random ones for the rest, orthogonal to all others.

    They are as long as the given ones on average.

    For experts to which too few tokens were routed.
    """
    if len(rows) >= rank:
        return rows
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(seed)
    drawn = torch.randn(
        rows.shape[1], rank - len(rows), generator=generator, dtype=torch.float32, device=cpu
    )
    orthonormal = torch.linalg.qr(torch.cat([rows.T, drawn], dim=1))[0]
    length = rows.norm(dim=1).mean() if len(rows) else 1.0
    return torch.cat([rows, fix_signs(orthonormal[:, len(rows) :].T) * length])


def require_scale(scale: str) -> None:
    """Raise a ConfigError for a scale that does not exist."""
    if scale not in SCALES:
        raise ConfigError(f"scale is {scale!r}; choose one of {', '.join(SCALES)}")


def choose_scale(scale: str | None, whiten: bool) -> str:
    """Return the scale in force: the caller's, else what `EvaConfig.whiten` of the adapter says.

    Raises:
        ConfigError: a scale that does not exist, or one that contradicts `whiten`.
    """
    if scale is None:
        return "whiten" if whiten else "paper"
    require_scale(scale)
    if whiten and scale != "whiten":
        raise ConfigError(
            f"scale is {scale!r} but the adapter's EvaConfig says whiten=True; leave out one of the"
            " two, or pass scale='whiten'"
        )
    return scale


def scaled_rows(spectrum: Spectrum, rank: int, scale: str) -> Tensor:
    """Return the matrix A of a layer, (rank, d) float32, and no view of the spectrum.

    It has fewer rows where fewer directions have energy.

    See `evatune.initialize` for the formula of each `scale`.
    """
    require_scale(scale)
    rank = min(rank, spectrum.usable)
    rows = spectrum.directions[:rank].clone()
    moments = spectrum.second_moments[:rank].double()
    if scale == "whiten":
        sigma = torch.maximum(
            spectrum.variances[:rank].double().sqrt(), _SIGMA_FLOOR * moments.sqrt()
        )
        return (rows / sigma[:, None]).float()
    if scale == "matched":
        default = rank / (3 * rows.shape[1]) * spectrum.total_second_moment
        return rows * float((default / moments.sum()).sqrt())
    return rows
