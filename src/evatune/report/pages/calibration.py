"""The page of a calibration: ranks, energies and spectra, against a uniform and a random start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evatune.calibration.result import Calibration
from evatune.choices import DEFAULT_SCALE
from evatune.loading.demo import model_id
from evatune.report.charts import HeatCell, heat_map, spectra
from evatune.report.pages.base import (
    Chart,
    Page,
    Table,
    Tile,
    document,
    number_cell,
    text_cell,
)
from evatune.report.summary import Figures, LayerRow, type_rows
from evatune.report.text import (
    LORA_RATE,
    NONE,
    or_dash,
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
    figures: Figures,
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
    calibration, plan = figures.calibration, figures.plan
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
        verdict=verdict(figures),
        command=command,
        tiles=tiles(figures, scale),
        charts=charts(figures),
        tables=tables(figures),
        notes=notes(figures, scale),
        settings=recorded_settings(calibration, settings),
    )
    return document(page)


def notes(figures: Figures, scale: str | None) -> list[str]:
    """Return what a calibration says in sentences, and what its figures mean."""
    return [*summary_lines(figures, [scale] if scale else []), *_MEANING]


def adapter_facts(rank: int, rho: float | None, alpha: Any) -> str:
    """Return "16 / 2 / 32"; a dash for what is not known."""
    return " / ".join(or_dash(value, "g") for value in (rank, rho, alpha))


def recorded_settings(calibration: Calibration, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run and its calibration, and the versions of what made it."""
    versions = {f"{name} version": value for name, value in calibration.versions.items()}
    return {**settings, **asdict(calibration.config), **versions}


def tiles(figures: Figures, scale: str | None) -> list[Tile]:
    """Return the figures below the header."""
    totals = figures.totals
    share, of_random = figures.known_mean, totals.random_mean
    seen = "unseen rows'" if totals.captured_mean is not None else "the rows'"
    shown = [
        Tile(percent(share), f"of {seen} energy captured, mean over layers"),
        Tile(
            times(share / of_random) if share is not None and of_random else NONE,
            f"a random A of the same ranks ({percent(of_random)})",
        ),
        Tile(percent(totals.captured_worst), "captured in the worst layer"),
        Tile(
            f"{totals.parameters:,}",
            f"trainable parameters, {signed_percent(totals.parameter_change)} against rank"
            f" {figures.plan.rank}",
        ),
        Tile(percent(totals.estimated_missed), "estimated miss against the best directions"),
    ]
    steps = totals.step_ratio.get(scale or "")
    if steps is not None:
        rate = rate_text(LORA_RATE / steps.median)
        shown.append(Tile(rate, f"learning rate for LoRA's {rate_text(LORA_RATE)} ({scale})"))
    return shown


def charts(figures: Figures) -> list[Chart]:
    """Return rank and energy of every layer as maps, and the spectra."""
    calibration, plan, rows = figures.calibration, figures.plan, figures.rows
    if not rows:
        return []
    of_ranks = _rank_map(figures)
    merged = any("layers" in value for value in of_ranks["data"]["values"])
    experts = " Experts of a block share a cell, with their means." if merged else ""
    uniform = f"Uniform LoRA gives {plan.rank} to every layer.{experts}"
    energies = [_energy_cell(figures, row) for row in rows]
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


def _rank_map(figures: Figures) -> Spec:
    """Return the rank of every layer as a map."""
    cells = [
        HeatCell(
            row.name,
            row.rank,
            row.rank - _uniform_rank(figures, row),
            _layer_facts(row),
        )
        for row in figures.rows
    ]
    return heat_map(cells, f"ranks against uniform ({figures.plan.rank})")


def _energy_cell(figures: Figures, row: LayerRow) -> HeatCell:
    share = row.known
    figure = None if share is None else 100 * share
    return HeatCell(row.name, figure, _gained(figures, row), _layer_facts(row))


def _layer_facts(row: LayerRow) -> dict[str, Any]:
    return {
        "rank": row.rank,
        "captured": row.captured,
        "random A": row.random,
        "PR": row.participation_ratio,
        "parameters": row.parameters,
        "status": row.status,
    }


def tables(figures: Figures) -> list[Table]:
    """Return a table of layer types, and one of all layers."""
    return [_by_type(figures.rows), _by_layer(figures.rows)]


def _by_type(rows: Sequence[LayerRow]) -> Table:
    headings = ["layer type", "layers", "rank min", "mean", "max", "captured", "random", "times"]
    headings += ["PR median", "parameters", "status"]
    lines = [
        (
            text_cell(row.type),
            number_cell(row.layers, "d"),
            number_cell(row.rank_min, "d"),
            number_cell(row.rank_mean, ".1f"),
            number_cell(row.rank_max, "d"),
            number_cell(row.known_mean, ".1%"),
            number_cell(row.random_mean, ".1%"),
            number_cell(row.times_random, ".1f"),
            number_cell(row.participation_ratio, ".1f"),
            number_cell(row.parameters, ",d"),
            text_cell(row.statuses),
        )
        for row in type_rows(rows)
    ]
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
            number_cell(row.participation_ratio, ".1f"),
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


def _gained(figures: Figures, row: LayerRow) -> float:
    """Return the points of energy that a layer holds more than at the uniform rank."""
    spectrum = figures.calibration.spectra[row.name]
    uniform = _uniform_rank(figures, row)
    if spectrum.certificate is not None:
        held = [spectrum.certificate.captured(rank) for rank in (row.rank, uniform)]
    else:
        shares = spectrum.explained_variance_ratio
        held = [float(shares[:rank].sum()) for rank in (row.rank, uniform)]
    return 100 * (held[0] - held[1])


def _uniform_rank(figures: Figures, row: LayerRow) -> int:
    return figures.calibration.layers[row.name].uniform_rank(figures.plan.rank)


def _data(settings: Mapping[str, Any]) -> str:
    data = settings.get("data")
    if not data:
        return ""
    count = settings.get("texts")
    return short_name(data) + (f" ({count:,} texts)" if isinstance(count, int) else "")
