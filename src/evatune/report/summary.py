"""Figures of a calibration by layer, by layer type and in all, for tables, pages and `--json`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from evatune.calibration.result import Calibration
from evatune.calibration.status import Status
from evatune.choices import SCALES
from evatune.errors import BudgetError
from evatune.layers import LayerSpec
from evatune.ranks.allocation import RankPlan

_ASK_FOR_A_LOOK = (Status.UNSETTLED, Status.DRIFTING)  # of those that are usable


@dataclass(frozen=True)
class LayerRow:
    """A layer's ranks and energies. Shares lie in [0, 1]; None where nothing is known."""

    spec: LayerSpec
    block: str  # what distinguishes it from layers of the same type, e.g. "3"
    type: str  # name without block numbers, e.g. "attention.self.query"
    rank: int
    rows: int
    participation_ratio: float | None  # of the input, at most in_features
    explained: float | None  # energy inside its `rank` directions, by the data that chose them
    captured: float | None  # the same on rows that had no part in choosing them
    # share of the best directions' energy that these are expected to miss on fresh rows
    estimated_missed: float | None
    status: str
    advice: str
    attention: bool  # whether the status asks for a look

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def known(self) -> float | None:
        """The share of the energy in the directions, by unseen rows if there were any."""
        return self.explained if self.captured is None else self.captured

    @property
    def of_achievable(self) -> float | None:
        """Energy captured, over what the directions explain of the rows that chose them."""
        if self.captured is None or not self.explained:
            return None
        return self.captured / self.explained

    @property
    def random(self) -> float:
        """Share of the energy that a random A of the same rank is expected to hold: r/d."""
        return min(1.0, self.rank / self.spec.in_features)

    @property
    def parameters(self) -> int:
        """Trainable parameters of the layer's A and B."""
        return self.rank * self.spec.parameters_per_rank

    def facts(self) -> dict[str, Any]:
        """Return the row for `--json`."""
        return {
            "name": self.name,
            "block": self.block,
            "type": self.type,
            "in_features": self.spec.in_features,
            "out_features": self.spec.out_features,
            "rank": self.rank,
            "parameters": self.parameters,
            "rows": self.rows,
            "participation_ratio": self.participation_ratio,
            "explained": self.explained,
            "captured": self.captured,
            "random": self.random,
            "estimated_missed": self.estimated_missed,
            "status": self.status,
            "advice": self.advice,
            "attention": self.attention,
        }


def plan_of(calibration: Calibration) -> tuple[RankPlan, str | None]:
    """Return the plan by the calibration's own settings; or rank 0 everywhere, and the reason.

    A calibration with unusable layers may leave too few components for the budget. Its statuses say
    why, so it must still be possible to look at it.
    """
    try:
        return calibration.allocate(), None
    except BudgetError as error:
        config = calibration.config
        rank = config.redistribution.rank
        layers = calibration.layers.values()
        ranks = [layer.uniform_rank(rank) for layer in layers]
        uniform = sum(
            count * layer.spec.parameters_per_rank
            for count, layer in zip(ranks, layers, strict=True)
        )
        plan = RankPlan(
            ranks=dict.fromkeys(calibration.layers, 0),
            rank=rank,
            rho=config.redistribution.rho,
            budget=config.budget,
            metric=config.metric,
            limit=sum(ranks) if config.budget == "ranks" else uniform,
            spent=0,
            parameters=0,
            uniform_parameters=uniform,
        )
        return plan, str(error)


def layer_rows(calibration: Calibration, plan: RankPlan) -> list[LayerRow]:
    """Return a row per layer, in model order."""
    rows = []
    for name, layer in calibration.layers.items():
        spectrum, rank = calibration.spectra[name], plan.ranks[name]
        certificate = spectrum.certificate
        block, kind = split_name(name)
        rows.append(
            LayerRow(
                spec=layer.spec,
                block=block,
                type=kind,
                rank=rank,
                rows=spectrum.rows,
                participation_ratio=spectrum.participation_ratio or None,
                explained=(
                    _known(float(spectrum.explained_variance_ratio[:rank].sum()))
                    if spectrum.rows
                    else None
                ),
                captured=_known(certificate.captured(rank)) if certificate else None,
                estimated_missed=layer.estimated_missed,
                status=str(calibration.status[name]),
                advice=calibration.status[name].advice,
                attention=calibration.status[name] in _ASK_FOR_A_LOOK
                or not calibration.status[name].usable,
            )
        )
    return rows


def _known(share: float) -> float | None:
    """Return the share, or None for NaN, which JSON cannot hold."""
    return share if math.isfinite(share) else None


def split_name(name: str) -> tuple[str, str]:
    """Return block and layer type of a name; ("", name) for a name without a number.

    "encoder.layer.3.attention.self.query" is ("3", "attention.self.query").
    """
    match = re.match(r"^(?:.*?\.)?(\d+)\.(.+)$", name)
    if match is None:
        return "", name
    rest = match.group(2)
    inner = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", rest)
    kind = re.sub(r"(^|\.)\d+(?=\.|$)", "", rest).strip(".")
    return ".".join([match.group(1), *inner]), kind or name


def by_type(names: Iterable[str]) -> dict[str, list[str]]:
    """Return layer type → names of its layers, in the order in which they come."""
    types: dict[str, list[str]] = {}
    for name in names:
        types.setdefault(split_name(name)[1], []).append(name)
    return types


@dataclass(frozen=True)
class TypeRow:
    """The ranks and energies of all layers of a type; None where nothing is known.

    Attributes:
        type: as in `LayerRow`. participation_ratio: the median. parameters: the sum.
        captured_mean, captured_worst: shares of the energy of unseen rows. random_mean: what random
            directions are expected to hold.
        statuses: with their counts, such as "3 converged, 1 drifting".
    """

    type: str
    layers: int
    rank_min: int
    rank_mean: float
    rank_max: int
    participation_ratio: float | None
    parameters: int
    captured_mean: float | None
    captured_worst: float | None
    known_mean: float | None
    random_mean: float
    missed_worst: float | None
    statuses: str

    @property
    def times_random(self) -> float | None:
        """How many times as much of the energy they hold as random directions would."""
        if not self.known_mean or not self.random_mean:
            return None
        return self.known_mean / self.random_mean


def type_rows(rows: Sequence[LayerRow]) -> list[TypeRow]:
    """Return a row per layer type, in the order of their first layers."""
    types: dict[str, list[LayerRow]] = {}
    for row in rows:
        types.setdefault(row.type, []).append(row)
    return [_type_row(layer_type, members) for layer_type, members in types.items()]


def _type_row(layer_type: str, members: Sequence[LayerRow]) -> TypeRow:
    ranks = [row.rank for row in members]
    captured = [row.captured for row in members if row.captured is not None]
    missed = [row.estimated_missed for row in members if row.estimated_missed is not None]
    participation = [row.participation_ratio for row in members if row.participation_ratio]
    counts = Counter(row.status for row in members)
    return TypeRow(
        type=layer_type,
        layers=len(members),
        rank_min=min(ranks),
        rank_mean=fmean(ranks),
        rank_max=max(ranks),
        participation_ratio=median(participation) if participation else None,
        parameters=sum(row.parameters for row in members),
        captured_mean=mean_or_none(captured),
        captured_worst=min(captured, default=None),
        known_mean=mean_or_none([row.known for row in members if row.known is not None]),
        random_mean=fmean(row.random for row in members),
        missed_worst=max(missed, default=None),
        statuses=", ".join(f"{count} {status}" for status, count in counts.items()),
    )


@dataclass(frozen=True)
class Spread:
    """The median and the ends of some figures."""

    median: float
    least: float
    largest: float


@dataclass(frozen=True)
class Totals:
    """The figures below the table of layers, also in `--json`; None where nothing is known.

    Attributes:
        layers_with_rank: layers that get a rank; means, worst shares and spreads are over these.
        captured_mean, captured_worst: shares of the energy of unseen rows. random_mean: what random
            directions are expected to hold.
        estimated_missed: share of the best directions' energy that is expected to be missed.
        of_achievable_mean, of_achievable_worst: captured, of what the same ranks explain.
        layers_above_pr: layers whose rank is above their participation ratio.
        step_ratio: κ by the scale of A's rows.
    """

    layers: int
    layers_with_rank: int
    distinct_inputs: int
    batches: int
    ranks: int
    budget: str
    budget_limit: int
    budget_spent: int
    parameters: int
    uniform_parameters: int
    captured_mean: float | None
    captured_worst: float | None
    random_mean: float | None
    estimated_missed: float | None
    of_achievable_mean: float | None
    of_achievable_worst: float | None
    participation_ratio: Spread | None
    layers_above_pr: int
    step_ratio: Mapping[str, Spread | None]

    @property
    def parameter_change(self) -> float:
        """The share by which there are more parameters than with uniform ranks."""
        return self.parameters / self.uniform_parameters - 1 if self.uniform_parameters else 0.0


@dataclass(frozen=True)
class Figures:
    """All that is shown of a calibration, computed once.

    Attributes:
        problem: why no ranks can be given; None where they are.
        rows: one per layer, in model order.
    """

    calibration: Calibration
    plan: RankPlan
    problem: str | None
    rows: Sequence[LayerRow]
    totals: Totals

    @classmethod
    def of(cls, calibration: Calibration, plan: RankPlan | None = None) -> Figures:
        """Return the figures with the ranks of a plan. Default: `plan_of` the calibration."""
        problem = None
        if plan is None:
            plan, problem = plan_of(calibration)
        rows = layer_rows(calibration, plan)
        return cls(calibration, plan, problem, rows, _totals(calibration, plan, rows))

    @property
    def known_mean(self) -> float | None:
        """The mean over layers with a rank of the shares that `LayerRow.known` gives."""
        shares = [row.known for row in self.rows if row.rank]
        return mean_or_none([share for share in shares if share is not None])


def _totals(calibration: Calibration, plan: RankPlan, every_row: Sequence[LayerRow]) -> Totals:
    rows = [row for row in every_row if row.rank]
    captured = calibration.captured(plan.ranks).values()
    ratios = [ratio for row in rows if (ratio := row.of_achievable) is not None]
    participation = [row.participation_ratio for row in rows if row.participation_ratio]
    return Totals(
        layers=len(calibration.layers),
        layers_with_rank=len(rows),
        distinct_inputs=len(
            {layer.input for layer in calibration.layers.values() if layer.input is not None}
        ),
        batches=calibration.batches,
        ranks=sum(plan.ranks.values()),
        budget=plan.budget,
        budget_limit=plan.limit,
        budget_spent=plan.spent,
        parameters=plan.parameters,
        uniform_parameters=plan.uniform_parameters,
        captured_mean=mean_or_none(captured),
        captured_worst=min(captured, default=None),
        random_mean=mean_or_none([row.random for row in rows]),
        estimated_missed=calibration.estimated_missed,
        of_achievable_mean=mean_or_none(ratios),
        of_achievable_worst=min(ratios, default=None),
        participation_ratio=_spread(participation),
        layers_above_pr=sum(row.rank > (row.participation_ratio or math.inf) for row in rows),
        step_ratio={
            scale: _spread(calibration.step_ratios(scale, plan).values()) for scale in SCALES
        },
    )


def mean_or_none(values: Collection[float]) -> float | None:
    """Return the mean; None where there are no values."""
    return fmean(values) if values else None


def _spread(values: Collection[float]) -> Spread | None:
    """Return the median and the ends of some figures; None where there are none."""
    if not values:
        return None
    return Spread(median(values), min(values), max(values))
