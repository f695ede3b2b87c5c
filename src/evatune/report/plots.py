"""Plots as SVG text, for the page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from evatune.calibration.result import Calibration
from evatune.ranks.allocation import RankPlan
from evatune.report.summary import LayerRow, split_name
from evatune.utils.atomic import atomic_file
from evatune.utils.extras import extras
from evatune.utils.markup import plot_text

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


def spectra(calibration: Calibration, plan: RankPlan) -> str:
    """Draw the explained variance ratios: a line per input, with a dot where its rank ends."""
    kinds = list(dict.fromkeys(split_name(name)[1] for name in calibration.layers))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6))
        axes = figure.add_subplot()
        colors = matplotlib.colormaps["tab10"]
        seen: set[int] = set()
        named: set[str] = set()
        for name, layer in calibration.layers.items():
            if layer.input is None or layer.input in seen:
                continue
            seen.add(layer.input)
            ratio = calibration.spectra[name].explained_variance_ratio.tolist()
            kind = split_name(name)[1]
            color = colors(kinds.index(kind) % 10)
            axes.plot(
                range(1, len(ratio) + 1),
                ratio,
                color=color,
                alpha=0.6,
                lw=1,
                label=None if kind in named else plot_text(kind),
            )
            named.add(kind)
            rank = plan.ranks[name]
            if rank and rank <= len(ratio):
                axes.plot([rank], [ratio[rank - 1]], "o", color=color, ms=3.5)
        axes.set_yscale("log")
        axes.set_xlabel("component")
        axes.set_ylabel("share of the layer's energy")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        return _svg(figure)


def energies(rows: Sequence[LayerRow]) -> str:
    """Draw the energy inside each layer's directions, of rows that chose them and unseen ones."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8))
        axes = figure.add_subplot()
        places = range(len(rows))
        axes.bar(
            places,
            [100 * (row.explained or 0) for row in rows],
            color="#c9d7e8",
            label="explained (rows that chose them)",
        )
        points = [
            (i, 100 * row.captured)
            for i, row in zip(places, rows, strict=True)
            if row.captured is not None
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                "o",
                color="#1f5fa8",
                ms=3.5,
                label="captured (unseen rows)",
            )
        axes.set_ylim(0, 100)
        axes.set_xlim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("layer, in model order")
        axes.set_ylabel("energy, %")
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2, bbox_to_anchor=(0, 1.17))
        return _svg(figure)


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


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with without_missing_glyphs():
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
