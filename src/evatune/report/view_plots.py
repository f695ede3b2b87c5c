"""Plots of a calibration, a plan and a spectrum, on axes of matplotlib."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

from evatune.calibration.result import Calibration
from evatune.ranks.allocation import RankPlan
from evatune.report.colors import ink_on
from evatune.report.plots import STYLE
from evatune.report.summary import plan_of, split_name
from evatune.report.text import NONE
from evatune.sketch.spectrum import Spectrum
from evatune.utils.extras import extras
from evatune.utils.markup import plot_text

with extras(__name__):
    import matplotlib
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.ticker import PercentFormatter

_INK = "#1b2733"


def plot(value: Any, ax: Axes | None) -> Axes:
    """Draw a result on axes, or on those of a new figure, and return them."""
    with matplotlib.rc_context(STYLE):
        if ax is None:
            from matplotlib import pyplot  # it chooses a backend, which only this needs

            _, ax = pyplot.subplots(figsize=figure_size(value), layout="constrained")
        draw(value, ax)
    return ax


@singledispatch
def draw(value: Any, ax: Axes) -> None:
    """Draw a result on axes."""
    raise TypeError(f"there is no plot of {type(value).__name__}")


@draw.register(Spectrum)
def _(spectrum: Spectrum, ax: Axes) -> None:
    _line(ax, _cumulative(spectrum), color="C0", label="explained (rows that chose them)")
    certificate = spectrum.certificate
    if certificate is not None and certificate.total_energy > 0:
        shares = certificate.energies.double() / certificate.total_energy
        fresh = [0.0, *shares.cumsum(0).tolist()]
        _line(ax, fresh, color="C1", linestyle="--", label="captured (unseen rows)")
    _label_shares(ax)
    ax.legend(frameon=False, loc="lower right")


@draw.register(Calibration)
def _(calibration: Calibration, ax: Axes) -> None:
    plan, _ = plan_of(calibration)
    drawn: set[int] = set()
    names = list(calibration.layers)
    colors = matplotlib.colormaps["viridis"]
    depth = Normalize(0, max(1, len(names) - 1))
    for position, name in enumerate(names):
        number = calibration.layers[name].input
        if number is None or number in drawn:
            continue
        drawn.add(number)
        shares = _cumulative(calibration.spectra[name])
        color = colors(depth(position))
        _line(ax, shares, color=color, alpha=0.7)
        rank = min(plan.ranks[name], len(shares) - 1)
        ax.plot([rank], [shares[rank]], "o", color=color, ms=4)
    _label_shares(ax)
    ax.set_title("Energy in the leading directions of each input; dot: its rank", loc="left")
    scale = matplotlib.cm.ScalarMappable(depth, colors)
    bar = ax.figure.colorbar(scale, ax=ax, ticks=[0, depth.vmax])
    bar.ax.set_yticklabels(["first layer", "last"])


@draw.register(RankPlan)
def _(plan: RankPlan, ax: Axes) -> None:
    split = {name: split_name(name) for name in plan.ranks}
    blocks = list(dict.fromkeys(block for block, _ in split.values()))
    types = list(dict.fromkeys(layer_type for _, layer_type in split.values()))
    table = [[math.nan] * len(blocks) for _ in types]
    for name, (block, layer_type) in split.items():
        table[types.index(layer_type)][blocks.index(block)] = plan.ranks[name]
    most = max(plan.rank + 1, *plan.ranks.values())
    image = ax.imshow(
        table, cmap="RdBu", aspect="auto", norm=TwoSlopeNorm(plan.rank, min(0, plan.rank - 1), most)
    )
    grounds = image.to_rgba(numpy.array(table), bytes=True)
    for down, row in enumerate(table):
        for across, rank in enumerate(row):
            if not math.isnan(rank):
                red, green, blue = grounds[down, across, :3].tolist()
                ink = ink_on((red, green, blue), _INK)
                ax.text(across, down, f"{rank:.0f}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(blocks)), [plot_text(block) or NONE for block in blocks])
    ax.set_yticks(range(len(types)), [plot_text(layer_type) for layer_type in types])
    ax.set_xlabel("block")
    bar = ax.figure.colorbar(image, ax=ax, ticks=[0, plan.rank, most])
    bar.set_label(f"rank (LoRA: {plan.rank})")


def figure_size(value: Any) -> tuple[float, float]:
    """Return width and height of a figure in inches."""
    if not isinstance(value, RankPlan):
        return 7.0, 4.0
    split = [split_name(name) for name in value.ranks]
    blocks = {block for block, _ in split}
    types = {layer_type for _, layer_type in split}
    longest = max((len(layer_type) for layer_type in types), default=0)
    return 2.0 + 0.08 * longest + 0.34 * len(blocks), 1.2 + 0.32 * len(types)


def _cumulative(spectrum: Spectrum) -> list[float]:
    """Return the share of energy in the first 0, 1, 2, … directions."""
    shares = spectrum.explained_variance_ratio.double().cumsum(0)
    return [0.0, *shares.tolist()]


def _line(ax: Axes, shares: list[float], **style: Any) -> None:
    ax.plot(range(len(shares)), shares, **{"lw": 1.2, **style})


def _label_shares(ax: Axes) -> None:
    ax.set(xlabel="directions", ylabel="share of energy", ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
