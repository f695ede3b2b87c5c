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
