"""Plots as Vega-Lite: heat maps of layers, spectra, and curves of training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evatune.calibration.result import Calibration
from evatune.ranks.allocation import RankPlan
from evatune.report.colors import Color, ink_on, rgb
from evatune.report.summary import mean_or_none, split_name
from evatune.report.text import NONE, or_dash
from evatune.report.vega import SCHEMA, Spec

# Less than uniform, the same, more. Orange and blue are told apart by all eyes.
_LESS, _SAME, _MORE = "#b35806", "#f2f4f6", "#1f5fa8"
# From the first block to the last; each with contrast on white and on a dark page.
_DEPTHS = ["#e0701a", "#c8378f", "#4f74e6"]
COLORS = ["#3f7fd1", "#e0701a", "#2f9e63", "#c8378f", "#8a6fd1", "#a8842c", "#3aa0ad", "#d15b5b"]
_CHANCE = "#8a939c"
_OUTSIDE = "#7b8794"  # of layers outside blocks
_MOST_BLOCKS = 150  # across a map, and lines of a kind in a panel
_POINTS = 28  # of a spectrum, more of which no eye sees


@dataclass(frozen=True)
class HeatCell:
    """A layer in a heat map: the figure that stands there, and by how much it is above uniform.

    Attributes:
        figure: shown as a whole number; None where it is not known.
        facts: what the pointer shows, by the names of `_FACTS`.
    """

    name: str
    figure: float | None
    difference: float
    facts: Mapping[str, Any]

    @property
    def text(self) -> str:
        return or_dash(self.figure, ".0f")


# Formats of the facts about a layer that are numbers.
_FACTS = {
    "layers": ",d",
    "rank": "d",
    "captured": ".1%",
    "random A": ".1%",
    "PR": ".1f",
    "parameters": ",d",
    "status": "",
}


def heat_map(cells: Sequence[HeatCell], legend: str) -> Spec:
    """Return a map of layers, blocks across and layer types down, colored by the difference.

    Args:
        legend: what the difference is.
    """
    cells = _merged_experts(cells)
    largest = max((abs(cell.difference) for cell in cells), default=0) or 1
    values: list[dict[str, Any]] = []
    for cell in cells:
        block, kind = split_name(cell.name)
        position = {"layer": cell.name, "block": block or NONE, "type": kind}
        drawn = {
            "text": cell.text,
            "difference": round(cell.difference, 4),
            "ink": ink_on(heat_color(cell.difference / largest)),
        }
        values.append(
            position | drawn | {key: _rounded(value) for key, value in cell.facts.items()}
        )
    shown = [key for key in _FACTS if any(key in cell.facts for cell in cells)]
    blocks = list(dict.fromkeys(value["block"] for value in values))
    types = list(dict.fromkeys(value["type"] for value in values))
    color = {
        "field": "difference",
        "type": "quantitative",
        "scale": {
            "domain": [-largest, 0, largest],
            "range": [_LESS, _SAME, _MORE],
            "interpolate": "rgb",
        },
        "legend": {"title": legend, "orient": "bottom", "gradientLength": 180, "titleLimit": 400},
    }
    return {
        "$schema": SCHEMA,
        "usermeta": {
            "fit": "heat",
            "across": len(blocks),
            "down": len(types),
            "letters": max(map(len, types), default=0),
        },
        "data": {"values": values},
        "width": {"step": 26},
        "height": {"step": 22},
        "resolve": {"scale": {"color": "independent"}},
        "encoding": {
            "x": _axis("block", blocks, "top"),
            "y": _axis("type", types, "left"),
            "tooltip": [_shown("layer"), *(_shown(key, _FACTS[key]) for key in shown)],
        },
        "layer": [
            {"mark": {"type": "rect", "cornerRadius": 2}, "encoding": {"color": color}},
            {
                "mark": {"type": "text", "fontSize": 10.5},
                "encoding": {
                    "text": {"field": "text"},
                    "color": {"field": "ink", "type": "nominal", "scale": None},
                },
            },
        ],
    }


def _merged_experts(cells: Sequence[HeatCell]) -> list[HeatCell]:
    """Return the cells; where experts make too many, one per block and type with the means."""
    blocks = {split_name(cell.name)[0] for cell in cells}
    if len(blocks) <= _MOST_BLOCKS:
        return list(cells)
    groups: dict[str, list[HeatCell]] = {}
    for cell in cells:
        groups.setdefault(_without_expert(cell.name), []).append(cell)
    merged = []
    for name, members in groups.items():
        if len(members) == 1:
            merged += members
            continue
        figures = [cell.figure for cell in members if cell.figure is not None]
        difference = fmean(cell.difference for cell in members)
        merged.append(HeatCell(name, mean_or_none(figures), difference, {"layers": len(members)}))
    return merged


def _without_expert(name: str) -> str:
    """Return a layer's name without the numbers after that of its block."""
    block, kind = split_name(name)
    return f"{block.partition('.')[0]}.{kind}" if block else name


def _shown(field: str, form: str = "") -> dict[str, str]:
    """Return what a tooltip shows of a field, a number in D3's `form`."""
    return {"field": field} | ({"format": form, "type": "quantitative"} if form else {})


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _axis(name: str, order: Sequence[str], side: str) -> dict[str, Any]:
    axis = {"title": None, "orient": side, "labelAngle": 0, "labelLimit": 220, "ticks": False}
    axis |= {"domain": False, "labelOverlap": True}
    scale = {"paddingInner": 0.08}
    return {"field": name, "type": "nominal", "sort": order, "axis": axis, "scale": scale}


def heat_color(share: float) -> Color:
    """Return the color of a difference from −1 to 1, as the plot makes it: linear in RGB."""
    ends = rgb(_SAME), rgb(_MORE if share > 0 else _LESS)
    red, green, blue = (
        round(same + abs(share) * (end - same)) for same, end in zip(*ends, strict=True)
    )
    return red, green, blue


def spectra(calibration: Calibration, plan: RankPlan) -> Spec:
    """Return the cumulative shares of energy: a panel per layer type, a line per distinct input.

    Types with the same inputs share a panel. A dot is where the largest rank of an input ends, the
    dashed line what random directions would hold.
    """
    panels: dict[int, list[str]] = {}  # input → layers
    for name, layer in calibration.layers.items():
        if layer.input is not None and calibration.spectra[name].rows:
            panels.setdefault(layer.input, []).append(name)
    blocks = {number: split_name(names[0])[0] for number, names in panels.items()}
    if len(set(blocks.values())) > _MOST_BLOCKS:  # of experts, the first of each block
        first = {_without_expert(names[0]): number for number, names in reversed(panels.items())}
        panels = {number: panels[number] for number in sorted(first.values())}
        blocks = {number: blocks[number].partition(".")[0] for number in panels}
    named = dict.fromkeys(block for block in blocks.values() if block)
    depths = {block: depth for depth, block in enumerate(named)}
    titles = {number: _panel_title(names) for number, names in panels.items()}
    values: list[dict[str, Any]] = []
    for number, names in panels.items():
        about: dict[str, Any] = {"panel": titles[number], "layer": names[0]}
        block = blocks[number]
        about |= {"depth": depths[block]} if block else {"outside": NONE}
        shares = calibration.spectra[names[0]].explained_variance_ratio.double().cumsum(0).tolist()
        width = calibration.layers[names[0]].in_features
        rank = min(max(plan.ranks[name] for name in names), len(shares))
        kept = {*_spread_out(len(shares)), rank} - {0}
        values += [
            about
            | {
                "directions": count,
                "share": round(shares[count - 1], 4),
                "random": round(count / width, 4),
            }
            | ({"rank": rank} if count == rank else {})
            for count in sorted(kept)
        ]
    return _spectra_spec(values, list(dict.fromkeys(titles.values())), list(depths))


def _panel_title(names: Sequence[str]) -> str:
    types = list(dict.fromkeys(split_name(name)[1] for name in names))
    heads, tails = zip(*(name.rpartition(".")[::2] for name in types), strict=True)
    if len(set(heads)) == 1:
        types = [f"{heads[0]}.{tails[0]}".strip("."), *tails[1:]]
    return ", ".join(types)


def _spread_out(count: int) -> list[int]:
    """Return numbers from 1 to `count`, the first ones dense."""
    if count <= _POINTS:
        return list(range(1, count + 1))
    return sorted({round(count ** (step / (_POINTS - 1))) for step in range(_POINTS)})


def _spectra_spec(
    values: Sequence[Mapping[str, Any]], panels: Sequence[str], blocks: Sequence[str]
) -> Spec:
    """Return the plot of such values.

    Args:
        blocks: names of the blocks, in the order of their depth.
    """
    across: Spec = {"field": "directions", "type": "quantitative", "title": "directions"}
    across |= {"axis": {"tickMinStep": 1, "format": "d"}}
    up: Spec = {"field": "share", "type": "quantitative", "title": None}
    top = max((value["share"] for value in values), default=1.0)
    up |= {"axis": {"format": "%", "tickCount": 4}}
    up |= {"scale": {"domain": [0, min(1.0, math.ceil(20 * top) / 20)]}}
    depth = {
        "field": "depth",
        "type": "quantitative",
        "scale": {"range": _DEPTHS, "interpolate": "rgb"},
        "legend": _block_legend(blocks) if len(blocks) > 1 else None,
    }
    outside = {
        "field": "outside",
        "type": "nominal",
        "scale": {"domain": [NONE], "range": [_OUTSIDE]},
        "legend": {"title": None, "symbolType": "stroke"} if blocks else None,
    }
    by_layer: Spec = {"x": across, "y": up, "detail": {"field": "layer"}}
    shown = [_shown("layer"), _shown("directions", "d")]
    shown += [_shown("share", ".1%"), _shown("random", ".1%")]
    layers = [
        {
            "mark": {"type": "line", "strokeDash": [4, 3], "color": _CHANCE, "strokeWidth": 1.2},
            "encoding": {"x": across, "y": up | {"field": "random", "aggregate": "mean"}},
        },
        *_lines_with_dots("depth", by_layer, {"color": depth}, {"color": depth}),
    ]
    if any("outside" in value for value in values):
        gray = {"color": {"value": _OUTSIDE}}
        layers += _lines_with_dots("outside", by_layer, {"stroke": outside}, gray)
    layers += [
        {
            "mark": {"type": "point", "size": 90, "opacity": 0},
            "encoding": by_layer | {"tooltip": shown},
        },
    ]
    header = {"labelFontSize": 11, "labelLimit": 230}
    panel = {"field": "panel", "type": "nominal", "sort": panels, "title": None, "header": header}
    return {
        "$schema": SCHEMA,
        "usermeta": {"fit": "facet", "panels": len(panels), "legend": True},
        "data": {"values": values},
        "facet": panel,
        "columns": 4,
        "spec": {"width": 190, "height": 120, "layer": layers},
        "resolve": {"scale": {"x": "independent"}},
    }


def _lines_with_dots(field: str, encoding: Spec, of_lines: Spec, of_dots: Spec) -> list[Spec]:
    """Return the lines of what has a field, and the dots where their ranks end.

    Args:
        encoding: of both. of_lines, of_dots: what colors them.
    """
    has_field = {"filter": f"isValid(datum.{field})"}
    return [
        {
            "transform": [has_field],
            "mark": {"type": "line", "strokeWidth": 1.3, "opacity": 0.85},
            "encoding": encoding | of_lines,
        },
        {
            "transform": [has_field, {"filter": "isValid(datum.rank)"}],
            "mark": {"type": "point", "filled": True, "size": 26, "opacity": 1},
            "encoding": encoding | of_dots,
        },
    ]


def _block_legend(blocks: Sequence[str]) -> Spec:
    """Return the legend of depths, with the blocks' own numbers."""
    return {
        "title": "block",
        "tickMinStep": 1,
        "labelExpr": f"{json.dumps(list(blocks))}[datum.value]",
    }


@dataclass(frozen=True)
class Curve:
    """A figure over the steps of training, of one method."""

    method: str
    points: Sequence[tuple[int, float]]
    panel: str = ""


def curves(lines: Iterable[Curve], methods: Sequence[str], *, log: bool = False) -> Spec:
    """Return curves over steps, a color per method; a panel each where the lines name panels.

    Args:
        methods: in the order of their colors, which other plots of the page share.
        log: the axis is logarithmic, where nothing is 0 or below.
    """
    lines = list(lines)
    values: list[dict[str, Any]] = [
        {"step": step, "value": float(f"{value:.6g}"), "method": line.method, "panel": line.panel}
        for line in lines
        for step, value in line.points
        if math.isfinite(value)
    ]
    panels = list(dict.fromkeys(value["panel"] for value in values))
    log = log and all(value["value"] > 0 for value in values)
    scale = {"type": "log"} if log else {"zero": False}
    up: Spec = {"field": "value", "type": "quantitative", "title": "", "scale": scale}
    if log:
        up |= {"axis": {"tickCount": 5, "format": "~g"}}
    elif any(len(figures) == 1 for figures in _figures_of(values).values()):
        up |= {"axis": {"format": ".6~g"}}  # by default one figure is shown as a whole number
    color = {
        "field": "method",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": methods, "range": colors_of(methods)},
        "legend": {"title": None, "orient": "top"} if len(methods) > 1 else None,
    }
    across = {"field": "step", "type": "quantitative", "axis": {"tickMinStep": 1}}
    encoding: Spec = {"x": across, "y": up, "color": color}
    encoding["tooltip"] = [_shown("method"), _shown("step", "d"), _shown("value", ".4~g")]
    mark = {"type": "line", "point": {"size": 22}, "strokeWidth": 1.6}
    spec: Spec = {"$schema": SCHEMA, "data": {"values": values}}
    if len(panels) < 2:
        meta = {"usermeta": {"fit": "plain"}, "height": 190, "width": 360}
        return spec | meta | {"mark": mark, "encoding": encoding}
    facet = {"field": "panel", "type": "nominal", "sort": panels, "title": None}
    return spec | {
        "usermeta": {"fit": "facet", "panels": len(panels)},
        "facet": facet,
        "columns": 3,
        "spec": {"width": 240, "height": 150, "mark": mark, "encoding": encoding},
        "resolve": {"scale": {"y": "independent"}},
    }


def _figures_of(values: Iterable[Mapping[str, Any]]) -> dict[str, set[float]]:
    """Return panel → the figures in it."""
    figures: dict[str, set[float]] = {}
    for value in values:
        figures.setdefault(value["panel"], set()).add(value["value"])
    return figures


def colors_of(methods: Sequence[str]) -> list[str]:
    """Return a color per method, told apart up to eight."""
    return [COLORS[number % len(COLORS)] for number in range(len(methods))]


@dataclass(frozen=True)
class Score:
    """A method's mean score on a task, and its deviation over seeds; None for a single seed."""

    task: str
    method: str
    mean: float
    deviation: float | None


def scores(points: Sequence[Score], methods: Sequence[str]) -> Spec:
    """Return a row per task and method, a dot at the mean and a line of a deviation each way."""
    values = [
        {
            "task": point.task,
            "method": point.method,
            "score": point.mean,
            "deviation": point.deviation,
        }
        | {"low": point.mean - (point.deviation or 0), "high": point.mean + (point.deviation or 0)}
        for point in points
        if math.isfinite(point.mean)
    ]
    tasks = list(dict.fromkeys(value["task"] for value in values))
    color = {
        "field": "method",
        "type": "nominal",
        "scale": {"domain": methods, "range": colors_of(methods)},
        "legend": None,
    }
    zero = {"zero": False, "padding": 12}
    across = {"type": "quantitative", "title": "score", "scale": zero}
    down = {"field": "method", "type": "nominal", "sort": methods, "title": None}
    encoding: Spec = {"y": down, "color": color}
    encoding["tooltip"] = [_shown("task"), _shown("method")]
    encoding["tooltip"] += [_shown("score", ".4f"), _shown("deviation", ".4f")]
    spread = {"x": across | {"field": "low"}, "x2": {"field": "high"}}
    layers = [
        {"mark": {"type": "rule", "strokeWidth": 1.6}, "encoding": encoding | spread},
        {
            "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
            "encoding": encoding | {"x": across | {"field": "score"}},
        },
    ]
    spec: Spec = {"$schema": SCHEMA, "data": {"values": values}}
    if len(tasks) < 2:
        meta = {"usermeta": {"fit": "plain"}, "width": 360, "height": {"step": 22}}
        return spec | meta | {"layer": layers}
    facet = {"field": "task", "type": "nominal", "sort": tasks, "title": None}
    return spec | {
        "usermeta": {"fit": "facet", "panels": len(tasks)},
        "facet": facet,
        "columns": 3,
        "spec": {"width": 240, "height": {"step": 20}, "layer": layers},
        "resolve": {"scale": {"x": "independent"}},
    }
