"""Sketches: what is kept of a layer's input rows. One algorithm per file behind one protocol."""

from __future__ import annotations

import torch

from evatune.sketch.base import Digest, Sketch
from evatune.sketch.counts import CountSketch
from evatune.sketch.gram import ExactSketch
from evatune.sketch.incremental import IncrementalSketch
from evatune.sketch.nystrom import NystromSketch

SKETCHES = ("nystrom", "exact", "incremental")


def make_sketch(
    kind: str, width: int, components: int, *, oversampling: int, center: bool, seed: int, device: torch.device
) -> Sketch:
    """A newborn sketch of the named kind: one of `SKETCHES`, or "counts" for rows that come as token ids."""
    if kind == "counts":
        return CountSketch(width, components, center=center, device=device)
    if kind == "nystrom":
        return NystromSketch(width, components, oversampling=oversampling, center=center, seed=seed, device=device)
    if kind == "exact":
        return ExactSketch(width, components, center=center, device=device)
    if kind == "incremental":
        return IncrementalSketch(width, components, center=center, device=device)
    raise ValueError(f"no sketch named {kind!r}; known are {', '.join(SKETCHES)}")


__all__ = [
    "SKETCHES",
    "CountSketch",
    "Digest",
    "ExactSketch",
    "IncrementalSketch",
    "NystromSketch",
    "Sketch",
    "make_sketch",
]
