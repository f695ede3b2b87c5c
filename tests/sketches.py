"""Sketches of small width, rows with planted directions, and the truth about them."""

from __future__ import annotations

import torch
from torch import Tensor

from evatune.sketch import Sketch, SketchSettings, make_sketch
from evatune.sketch.spectrum import Spectrum

torch.set_num_threads(1)


def build(kind: str, d: int, k: int, *, center: bool = False, seed: int = 0) -> Sketch:
    return make_sketch(kind, SketchSettings(d, k, oversampling=8, center=center, seed=seed))


def planted(n: int, d: int, *, seed: int = 0, decay: float = 0.8, mean: float = 0.0) -> Tensor:
    """(n, d) rows with geometrically falling standard deviations along random directions."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    scales = decay ** torch.arange(d)
    offset = mean * torch.randn(d, generator=generator)
    return torch.randn(n, d, generator=generator) * scales @ axes + offset


def truth(rows: Tensor, k: int, center: bool = False) -> tuple[Tensor, Tensor, float]:
    """Directions (k, d), energies (k,) per row, total energy per row; in float64."""
    rows = rows.double()
    if center:
        rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return vectors.flip(1).T[:k], values.flip(0)[:k], float(values.sum())


def feed(sketch: Sketch, rows: Tensor, size: int, refresh: bool = True) -> Spectrum:
    for number, part in enumerate(rows.split(size), start=1):
        sketch.update(part)
        if refresh and number & (number - 1) == 0:
            sketch.refresh()
    return sketch.spectrum()


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Return the angles in radians between the row spaces of two orthonormal bases.

    Args:
        a: (p, d) with orthonormal rows. b: (q, d) likewise.

    Returns:
        (min(p, q),) float64, ascending. Computed from sines where the cosine is near one
        (Björck & Golub 1973), so tiny angles are not rounded to 1e-8.
    """
    small, large = sorted((a.double(), b.double()), key=len)
    overlaps = small @ large.T
    cosines = torch.linalg.svdvals(overlaps).clamp(max=1.0)  # descending, so angles ascend
    residual = small - overlaps @ large
    sines = torch.linalg.svdvals(residual).clamp(max=1.0).flip(0)
    return torch.where(cosines > 0.7, torch.asin(sines), torch.acos(cosines))


def captured_energy(directions: Tensor, rows: Tensor) -> float:
    """Return the share of `‖rows‖²`, rows (n, d), in the span of orthonormal directions (k, d)."""
    rows = rows.double()
    total = float(rows.square().sum())
    if total <= 0:
        return 0.0
    projected = rows @ directions.double().T
    return float(projected.square().sum()) / total
