"""The page of a calibration: ranks, energies and spectra, against a uniform and a random start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from evatune.calibration.result import Calibration
from evatune.choices import DEFAULT_SCALE
from evatune.loading.demo import model_id
from evatune.ranks.allocation import RankPlan
from evatune.report.charts import HeatCell, heat_map, spectra
from evatune.report.pages.base import (
    Cell,
    Chart,
    Page,
    Table,
    Tile,
    document,
    number_cell,
    text_cell,
)
from evatune.report.summary import LayerRow, layer_rows, totals_of
from evatune.report.text import (
    LORA_RATE,
    effective,
    mean_captured,
    percent,
    rate_text,
    signed_percent,
    summary_lines,
    times,
    verdict,
)
from evatune.report.vega import Spec
from evatune.utils.names import short_name

_MOST_ROWS = 2000  # of the table of layers, which is half a megabyte

_MEANING = (
    "Captured: share of the energy of unseen rows inside a layer's directions, those known before"
    " the rows came. Explained: the same of the rows that chose the directions. Random: what as"
    " many random directions of that width would hold, r/d.",
    "PR, the participation ratio: over how many directions an input's energy is spread in effect."
    " What no direction holds counts as spread evenly over the rest, so PR is an upper bound.",
    "Missed: of the energy that the best directions would capture of fresh data, the share that"
    " these are expected to miss, by what the second half of the data changed.",
)


def render(
    calibration: Calibration,
    plan: RankPlan,
    settings: Mapping[str, Any],
    scale: str | None = DEFAULT_SCALE,
    command: str = "",
) -> str:
    """Return the page of a calibration as one HTML document.

    Args:
        settings: what the run was called with, shown as is at the end; model, data, method and α
            stand in the header too.
        scale: of the rows of A, for what is said about learning rates; None: nothing is said.
        command: what to do next, shown to be copied.
    """
    source = settings.get("model") or calibration.model
    model = short_name(model_id(source) or source)
    facts = {
        "model": model,
        "data": _data(settings),
        "method": str(settings.get("method", "eva")),
        "r / ρ / α": adapter_facts(plan.rank, plan.rho, settings.get("alpha")),
        "batches": str(calibration.batches),
    }
    page = Page(
        title=f"EVA start for {model}",
        facts={name: value for name, value in facts.items() if value},
        verdict=verdict(calibration, plan),
        command=command,
        tiles=tiles(calibration, plan, scale),
        charts=charts(calibration, plan),
        tables=tables(calibration, plan),
        notes=notes(calibration, plan, scale),
        settings=settings_of(calibration, settings),
    )
    return document(page)


def notes(calibration: Calibration, plan: RankPlan, scale: str | None) -> list[str]:
    """Return what a calibration says in sentences, and what its figures mean."""
    return [*summary_lines(calibration, plan, [scale] if scale else []), *_MEANING]


def adapter_facts(rank: int, rho: float | None, alpha: Any) -> str:
    """Return "16 / 2 / 32"; a dash for what is not known."""
    known = ("–" if value is None else f"{value:g}" for value in (rank, rho, alpha))
    return " / ".join(known)


def settings_of(calibration: Calibration, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run and its calibration, and the versions of what made it."""
    versions = {f"{name} version": value for name, value in calibration.versions.items()}
    return {**settings, **asdict(calibration.config), **versions}


def tiles(calibration: Calibration, plan: RankPlan, scale: str | None) -> list[Tile]:
    """Return the figures below the header."""
    figures = totals_of(calibration, plan)
    share, of_random = mean_captured(calibration, plan), figures.random_mean
    seen = "unseen rows'" if figures.captured_mean is not None else "the rows'"
    shown = [
        Tile(percent(share), f"of {seen} energy captured, mean over layers"),
        Tile(
            times(share / of_random) if share is not None and of_random else "–",
            f"a random A of the same ranks ({percent(of_random)})",
        ),
        Tile(percent(figures.captured_worst), "captured in the worst layer"),
        Tile(
            f"{figures.parameters:,}",
            f"trainable parameters, {signed_percent(figures.parameter_change)} against rank"
            f" {plan.rank}",
        ),
        Tile(percent(figures.estimated_missed), "estimated miss against the best directions"),
    ]
    steps = figures.step_ratio.get(scale or "")
    if steps is not None:
        rate = rate_text(LORA_RATE / steps.median)
        shown.append(Tile(rate, f"learning rate for LoRA's {rate_text(LORA_RATE)} ({scale})"))
    return shown


def charts(calibration: Calibration, plan: RankPlan) -> list[Chart]:
    """Return rank and energy of every layer as maps, and the spectra."""
    rows = layer_rows(calibration, plan)
    if not rows:
        return []
    of_ranks = rank_map(calibration, plan)
    merged = any("layers" in value for value in of_ranks["data"]["values"])
    experts = " Experts of a block share a cell, with their means." if merged else ""
    uniform = f"Uniform LoRA gives {plan.rank} to every layer.{experts}"
    energies = [_energy_cell(calibration, plan, row) for row in rows]
    shown = [
        Chart(
            "ranks",
            "Rank of each layer",
            of_ranks,
            f"{uniform} {plan.spent:,} of {plan.limit:,} {plan.budget} are spent.",
        ),
        Chart(
            "energy",
            "Energy captured in each layer, %",
            heat_map(energies, f"points of energy against rank {plan.rank}"),
            "The figure is the share at the layer's rank, the color what redistribution changed.",
        ),
    ]
    if any(calibration.spectra[row.name].rows for row in rows):
        note = (
            "Share of the energy in the leading directions, a line per distinct input, from the"
            " first block (orange) to the last (blue), gray outside blocks. A dot is where the rank"
            " ends; dashed: as many random directions."
        )
        shown.append(Chart("spectra", "Spectra, cumulative", spectra(calibration, plan), note))
    return shown


def rank_map(calibration: Calibration, plan: RankPlan) -> Spec:
    """Return the rank of every layer as a map."""
    cells = [
        HeatCell(
            row.name,
            row.rank,
            row.rank - calibration.layers[row.name].uniform_rank(plan.rank),
            _layer_facts(row),
        )
        for row in layer_rows(calibration, plan)
    ]
    return heat_map(cells, f"ranks against uniform ({plan.rank})")


def _energy_cell(calibration: Calibration, plan: RankPlan, row: LayerRow) -> HeatCell:
    share = row.known
    figure = None if share is None else 100 * share
    return HeatCell(row.name, figure, _gained(calibration, plan, row), _layer_facts(row))


def _layer_facts(row: LayerRow) -> dict[str, Any]:
    return {
        "rank": row.rank,
        "captured": row.captured,
        "random A": row.random,
        "PR": row.participation_ratio,
        "parameters": row.parameters,
        "status": row.status,
    }


def tables(calibration: Calibration, plan: RankPlan) -> list[Table]:
    """Return a table of layer types, and one of all layers."""
    rows = layer_rows(calibration, plan)
    return [_by_type(rows), _by_layer(rows)]


def _by_type(rows: Sequence[LayerRow]) -> Table:
    headings = ["layer type", "layers", "rank min", "mean", "max", "captured", "random", "times"]
    headings += ["PR median", "parameters", "status"]
    lines = []
    for kind in dict.fromkeys(row.type for row in rows):
        members = [row for row in rows if row.type == kind]
        ranks = [row.rank for row in members]
        shares = [share for row in members if (share := row.known) is not None]
        of_random = fmean(row.random for row in members)
        share = fmean(shares) if shares else None
        ratios = [row.participation_ratio for row in members if row.participation_ratio]
        statuses = Counter(row.status for row in members)
        lines.append(
            (
                text_cell(kind),
                number_cell(len(members), "d"),
                number_cell(min(ranks), "d"),
                number_cell(fmean(ranks), ".1f"),
                number_cell(max(ranks), "d"),
                number_cell(share, ".1%"),
                number_cell(of_random, ".1%"),
                number_cell(share / of_random if share and of_random else None, ".1f"),
                number_cell(median(ratios) if ratios else None, ".1f"),
                number_cell(sum(row.parameters for row in members), ",d"),
                text_cell(", ".join(f"{count} {status}" for status, count in statuses.items())),
            )
        )
    return Table("layer-types", "Layer types", headings, lines)


def _by_layer(rows: Sequence[LayerRow]) -> Table:
    headings = ["layer", "in", "out", "rank", "PR", "parameters", "rows", "explained", "captured"]
    headings += ["random", "missed", "status"]
    lines = [
        (
            text_cell(row.name),
            number_cell(row.spec.in_features, "d"),
            number_cell(row.spec.out_features, "d"),
            number_cell(row.rank, "d"),
            Cell(row.participation_ratio, effective(row.participation_ratio)),
            number_cell(row.parameters, ",d"),
            number_cell(row.rows, ",d"),
            number_cell(row.explained, ".1%"),
            number_cell(row.captured, ".1%"),
            number_cell(row.random, ".1%"),
            number_cell(row.estimated_missed, ".1%"),
            text_cell(row.status, row.advice),
        )
        for row in rows
    ]
    marked = {number for number, row in enumerate(rows) if row.attention}
    shown = lines[:_MOST_ROWS]
    note = f"The first {len(shown):,}; evatune inspect --json has all." if shown != lines else ""
    return Table("layers", f"All {len(rows):,} layers", headings, shown, note, marked)


def _gained(calibration: Calibration, plan: RankPlan, row: LayerRow) -> float:
    """Return the points of energy that a layer holds more than at the uniform rank."""
    spectrum = calibration.spectra[row.name]
    uniform = calibration.layers[row.name].uniform_rank(plan.rank)
    if spectrum.certificate is not None:
        held = [spectrum.certificate.captured(rank) for rank in (row.rank, uniform)]
    else:
        shares = spectrum.explained_variance_ratio
        held = [float(shares[:rank].sum()) for rank in (row.rank, uniform)]
    return 100 * (held[0] - held[1])


def _data(settings: Mapping[str, Any]) -> str:
    data = settings.get("data")
    if not data:
        return ""
    count = settings.get("texts")
    return short_name(data) + (f" ({count:,} texts)" if isinstance(count, int) else "")
