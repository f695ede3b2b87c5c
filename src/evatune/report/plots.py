"""The common style of matplotlib's figures, and how they are saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evatune.utils.atomic import atomic_file
from evatune.utils.extras import extras

with extras(__name__):
    import matplotlib
    from matplotlib.figure import Figure

_DPI = 120
STYLE = {  # also while a figure is saved: it fixes the ids inside an SVG
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "evatune",
}


@contextmanager
def without_missing_glyphs() -> Iterator[None]:
    """Draw a box for a sign that the font does not have, and say nothing of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the name's end; the same figure gives the same bytes."""
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    style = matplotlib.rc_context(STYLE)
    with style, atomic_file(path) as temporary, without_missing_glyphs():
        figure.savefig(temporary, dpi=_DPI, format=kind, metadata=metadata)
