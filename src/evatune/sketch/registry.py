"""The sketches by name: adding one is a file of its own and a line in `SKETCHES`."""

from __future__ import annotations

from collections.abc import Sequence

from evatune.choices import OBJECTIVES
from evatune.sketch.additive import AdditiveSketch
from evatune.sketch.base import InputSketch, Sketch, SketchSettings
from evatune.sketch.exact import ExactSketch
from evatune.sketch.examples import ExampleSketch
from evatune.sketch.gradients import GradientSketch
from evatune.sketch.incremental import IncrementalSketch
from evatune.sketch.nystrom import NystromSketch
from evatune.sketch.regression import RegressionSketch
from evatune.sketch.spectrum import Spectrum
from evatune.sketch.token_counts import CountSketch

# What `CalibrationConfig.sketch` may name: a line here, and its name in `evatune.choices`.
SKETCHES: dict[str, type[InputSketch]] = {
    "nystrom": NystromSketch,
    "exact": ExactSketch,
    "incremental": IncrementalSketch,
}
TOKEN_COUNTS = "counts"  # not a choice: the sketch of rows that come as token ids


def make_sketch(kind: str, settings: SketchSettings) -> InputSketch:
    """Return an empty sketch of a kind in `SKETCHES`, or `TOKEN_COUNTS` for token ids."""
    if kind == TOKEN_COUNTS:
        return CountSketch(settings)
    if kind not in SKETCHES:
        raise ValueError(f"no sketch named {kind!r}; known are {', '.join(SKETCHES)}")
    return SKETCHES[kind](settings)


def make_example_sketch(
    objective: str, settings: SketchSettings, out_features: int
) -> ExampleSketch:
    """Return an empty sketch for an objective that sees gradients."""
    if objective == "gradients":
        return GradientSketch(settings)
    if objective == "regression":
        return RegressionSketch(settings, out_features)
    raise ValueError(f"no sketch for objective {objective!r}; known are {', '.join(OBJECTIVES)}")


def is_additive(kind: str) -> bool:
    """Return True if the sums of several processes' sketches of this kind add up."""
    return issubclass(SKETCHES[kind], AdditiveSketch)


def refresh_all(sketches: Sequence[Sketch]) -> list[Spectrum]:
    """Refresh each sketch that has seen a row, those of one kind together; return all spectra."""
    spectra: dict[int, Spectrum] = {}
    by_kind: dict[type[Sketch], list[int]] = {}
    for position, sketch in enumerate(sketches):
        if sketch.shift is None:
            spectra[position] = sketch.spectrum()
        else:
            by_kind.setdefault(type(sketch), []).append(position)
    for kind, positions in by_kind.items():
        refreshed = kind.refresh_together([sketches[position] for position in positions])
        spectra.update(zip(positions, refreshed, strict=True))
    return [spectra[position] for position in range(len(sketches))]
