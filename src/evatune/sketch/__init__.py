"""Sketches: what is kept of a layer's input rows. One algorithm per file behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evatune.sketch.base import Sketch, SketchUpdate
from evatune.sketch.exact import ExactSketch
from evatune.sketch.incremental import IncrementalSketch
from evatune.sketch.nystrom import NystromSketch
from evatune.sketch.spectrum import Spectrum
from evatune.sketch.token_counts import CountSketch

SKETCHES = ("nystrom", "exact", "incremental")


def make_sketch(
    kind: str,
    width: int,
    components: int,
    *,
    oversampling: int,
    center: bool,
    seed: int,
    device: torch.device,
) -> Sketch:
    """A newborn sketch of the named kind: one of `SKETCHES`, or "counts" for rows that come as
    token ids."""
    if kind == "counts":
        return CountSketch(width, components, center=center, device=device)
    if kind == "nystrom":
        return NystromSketch(
            width, components, oversampling=oversampling, center=center, seed=seed, device=device
        )
    if kind == "exact":
        return ExactSketch(width, components, center=center, device=device)
    if kind == "incremental":
        return IncrementalSketch(width, components, center=center, device=device)
    raise ValueError(f"no sketch named {kind!r}; known are {', '.join(SKETCHES)}")


def refresh_all(sketches: Sequence[Sketch]) -> list[Spectrum]:
    """`Sketch.refresh` of each, those of one kind and shape together; what has not seen a row yet
    stays as it is."""
    born = [place for place, sketch in enumerate(sketches) if sketch.shift is not None]
    answers = {
        place: sketch.spectrum() for place, sketch in enumerate(sketches) if place not in born
    }
    kinds: list[type[Sketch]] = list(dict.fromkeys(type(sketches[place]) for place in born))
    for kind in kinds:
        places = [place for place in born if type(sketches[place]) is kind]
        answers.update(
            zip(places, kind.refresh_all([sketches[place] for place in places]), strict=True)
        )
    return [answers[place] for place in range(len(sketches))]


__all__ = [
    "SKETCHES",
    "CountSketch",
    "ExactSketch",
    "IncrementalSketch",
    "NystromSketch",
    "Sketch",
    "SketchUpdate",
    "make_sketch",
    "refresh_all",
]
