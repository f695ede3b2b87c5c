"""Sketches: what is kept of a layer's input rows. One algorithm per file behind one protocol."""

from __future__ import annotations

from evatune.sketch.additive import AdditiveSketch
from evatune.sketch.base import InputSketch, Sketch, SketchSettings, SketchUpdate
from evatune.sketch.exact import ExactSketch
from evatune.sketch.examples import Examples, ExampleSketch
from evatune.sketch.incremental import IncrementalSketch
from evatune.sketch.nystrom import NystromSketch
from evatune.sketch.registry import (
    SKETCHES,
    TOKEN_COUNTS,
    is_additive,
    make_example_sketch,
    make_sketch,
    refresh_all,
)
from evatune.sketch.token_counts import CountSketch

__all__ = [
    "SKETCHES",
    "TOKEN_COUNTS",
    "AdditiveSketch",
    "CountSketch",
    "ExactSketch",
    "ExampleSketch",
    "Examples",
    "IncrementalSketch",
    "InputSketch",
    "NystromSketch",
    "Sketch",
    "SketchSettings",
    "SketchUpdate",
    "is_additive",
    "make_example_sketch",
    "make_sketch",
    "refresh_all",
]
