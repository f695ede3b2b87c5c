"""Values of named options: a type and a tuple of each, its default, and the check of a value.

Nothing heavy loads here: `--help` lists these names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from evatune.errors import ConfigError

# Length of the rows of A, see `evatune.scaling`.
Scale = Literal["paper", "whiten", "matched", "whiten-matched"]
# What components are ranked by, and what stays as in uniform LoRA: see `evatune.ranks.allocation`.
Metric = Literal["ratio", "raw", "max", "sum"]
Budget = Literal["ranks", "parameters"]
# What is kept of a layer's inputs: the keys of `evatune.sketch.SKETCHES`.
SketchName = Literal["nystrom", "exact", "incremental"]
# What directions are leading in; all but the first need a loss.
Objective = Literal["activations", "gradients", "regression"]
# What becomes of adapted layers that EVA does not initialize.
OnUnsupported = Literal["error", "skip"]

SCALES: tuple[Scale, ...] = get_args(Scale)
METRICS: tuple[Metric, ...] = get_args(Metric)
BUDGETS: tuple[Budget, ...] = get_args(Budget)
SKETCH_NAMES: tuple[SketchName, ...] = get_args(SketchName)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
ON_UNSUPPORTED: tuple[OnUnsupported, ...] = get_args(OnUnsupported)

# Of `evatune.initialize`, `evatune init` and the recipes: the one at which LoRA's usual α and rates
# are as safe as in LoRA, whatever the width. See docs/learning-rate.md for what was measured.
DEFAULT_SCALE: Scale = "matched"
DEFAULT_RANK, DEFAULT_RHO = 16, 2.0
DEFAULT_BUDGET: Budget = "ranks"
DEFAULT_METRIC: Metric = "ratio"

IGNORED = -100
"""Label of a token that the loss leaves out, by torch's and transformers' convention."""


@dataclass(frozen=True, kw_only=True)
class RankBudget:
    """How many ranks there are, and by which rule they spread; see `evatune.ranks.allocate`."""

    rank: int
    rho: float
    budget: Budget
    metric: Metric


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError for a value of the option `name` that is not `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def largest_rank(rank: int, rho: float) -> int:
    """Return ⌊ρ·r⌋, the most ranks that a layer gets; of a product a rounding below, the next."""
    return math.floor(rank * rho + 1e-9)


def is_number(value: object) -> bool:
    """Return whether a value is a number that JSON can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number; to Python, True is one."""
    return isinstance(value, int) and not isinstance(value, bool)


def require_whole(name: str, value: int, least: int) -> None:
    """Raise a ConfigError unless the option `name` is a whole number, `least` ≤ value < 2⁶³."""
    if not is_whole(value):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if value >= 2**63:
        raise ConfigError(f"{name} is {value}; it must be below 2 to the power 63")


def require_rho(rho: float) -> None:
    """Raise a ConfigError unless 1 ≤ ρ < ∞."""
    if not is_number(rho) or not 1 <= rho < math.inf:
        raise ConfigError(
            f"rho is {rho!r}; it must be a number of at least 1 (1 = no redistribution, 2 = the"
            " usual choice)"
        )
