"""Every setting of a calibration, with its default and its help text, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evatune.choices import (
    BUDGETS,
    DEFAULT_BUDGET,
    DEFAULT_METRIC,
    DEFAULT_RANK,
    DEFAULT_RHO,
    IGNORED,
    METRICS,
    OBJECTIVES,
    SKETCH_NAMES,
    Budget,
    Metric,
    Objective,
    RankBudget,
    SketchName,
    is_number,
    largest_rank,
    require_choice,
    require_rho,
    require_whole,
)
from evatune.errors import ConfigError


def _setting(default: Any, help: str) -> Any:
    """Return a field with its help text, for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Settings of a calibration: how activations are summarized, and when to stop.

    Attributes:
        rank: r, ranks per layer before redistribution. Default: the adapter's, where there is one,
            else 16.
        rho: ρ ≥ 1; no layer gets more than ρ·r ranks. Default: the adapter's `EvaConfig.rho`, else
            2.
        components: directions kept per layer; default ⌊ρ·r⌋, what the redistribution can use.
        budget, metric: what the stop rule's trial redistribution uses; see `Calibration.allocate`.
        objective: what directions are leading in. "activations" (default): E[x xᵀ] of a layer's
            inputs. "gradients": E[GᵀG], with G = Σ g xᵀ over the tokens of one example, g the
            gradient of its loss by the layer's output; the orthonormal A into whose B the most
            gradient flows. "regression": the mean of G regressed on x, see
            `evatune.sketch.regression`. The last two need batches with labels, or `loss=`, and one
            backward pass to the activations per batch; base weights need no gradient.
        sketch: "nystrom" (default), "exact" (full second moment), "incremental" (the paper's
            algorithm).
        center: subtract the mean. False (default) is what the paper's theorem maximizes: the
            gradient of B at step 0 grows with E‖Ax‖², mean included. True is the paper's code
            (PCA).
        oversampling: columns of the Nyström basis beyond `components`.
        max_batches: bound on forward passes, of all processes together; each gets at least one.
        tolerance: stop when the directions in use are estimated to miss less than this share of the
            energy that the best ones would hold, and the redistribution of its worth. The estimate
            is what the second half of the data so far has changed, at 4, 6, 8, 12, 16, 24, …
            batches (`Calibration.estimated_missed`). Where the newest batches drift, the run goes
            on. 0: never stop before `max_batches` or the end of the data.
        labels_only: count only tokens that have a loss; the model is asked whether it compares
            token t with label t + 1. "auto": where a batch has a label per token, and not for
            encoder-decoder models, whose labels are the decoder's. Default: what the adapter's
            `EvaConfig.use_label_mask` asks for, else False.
        ignore_index: label of tokens without a loss.
        seed: of the sketch's random start.
        distributed: whether the processes of torch.distributed, where there are several, calibrate
            together, each on batches of its own. False: every process works alone, as if there were
            no other.
        rendezvous_timeout: seconds in which all of these processes must have come, after the first
            one.

    Raises:
        ConfigError: a value out of its range.
    """

    rank: int | None = _setting(None, "Ranks per layer before redistribution.")
    rho: float | None = _setting(
        None, "No layer gets more than rho times rank; 1: no redistribution."
    )
    components: int | None = None
    budget: Budget = _setting(
        DEFAULT_BUDGET, "What stays the same as in uniform LoRA: ranks or parameters."
    )
    metric: Metric = _setting(
        DEFAULT_METRIC, "What components are ranked by: ratio, raw, max or sum."
    )
    objective: Objective = _setting(
        "activations", "What directions are leading in: activations, gradients or regression."
    )
    sketch: SketchName = _setting("nystrom", "nystrom, exact or incremental.")
    center: bool = _setting(False, "Subtract the mean (PCA, as the paper's code does).")
    oversampling: int = 16
    max_batches: int = _setting(64, "Bound on forward passes.")
    tolerance: float = _setting(
        0.01,
        "Stop when less than this share of energy is estimated to be missed; 0: not before"
        " --max-batches.",
    )
    labels_only: bool | Literal["auto"] | None = None
    ignore_index: int = IGNORED
    seed: int = _setting(0, "Of the order of texts, new weights and the sketch's start.")
    distributed: bool = True
    rendezvous_timeout: float = 120.0

    def __post_init__(self) -> None:
        for name, least in (
            ("rank", 1),
            ("max_batches", 1),
            ("components", 1),
            ("oversampling", 0),
            ("seed", 0),
            ("ignore_index", -(2**63)),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("rank", "components"):
                require_whole(name, value, least)
        require_rho(self.redistribution.rho)
        if not (is_number(self.tolerance) and 0 <= self.tolerance < 1):
            raise ConfigError(
                f"tolerance is {self.tolerance!r}; it must be a number in [0, 1), and 0 means never"
                " stop early"
            )
        timeout = self.rendezvous_timeout
        if not (is_number(timeout) and 0 < timeout < math.inf):
            raise ConfigError(
                f"rendezvous_timeout is {timeout!r}; it must be a number of seconds above 0"
            )
        self._require_flags()
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("sketch", SKETCH_NAMES),
            ("budget", BUDGETS),
            ("metric", METRICS),
        ):
            require_choice(name, getattr(self, name), allowed)

        if self.needs_loss and (self.sketch != "nystrom" or self.center):
            setting = "center=True" if self.center else f"sketch={self.sketch!r}"
            raise ConfigError(
                f"objective={self.objective!r} has a sketch of its own, about zero; leave out"
                f" {setting}, or use objective='activations'"
            )

    def _require_flags(self) -> None:
        """Raise a ConfigError for what is no truth value; to Python, 1 is equal to True."""
        for name in ("center", "distributed"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if not isinstance(self.labels_only, bool) and self.labels_only not in (None, "auto"):
            raise ConfigError(
                f"labels_only is {self.labels_only!r}; it must be True, False or 'auto'"
            )

    @property
    def needs_loss(self) -> bool:
        """True if a backward pass from a loss is needed."""
        return self.objective != "activations"

    @property
    def redistribution(self) -> RankBudget:
        """Settings of the redistribution, with the defaults in place of what is left open."""
        return RankBudget(
            rank=DEFAULT_RANK if self.rank is None else self.rank,
            rho=DEFAULT_RHO if self.rho is None else self.rho,
            budget=self.budget,
            metric=self.metric,
        )

    @property
    def n_components(self) -> int:
        """Directions kept per layer."""
        if self.components is not None:
            return self.components
        return largest_rank(self.redistribution.rank, self.redistribution.rho)

    def resolved(self) -> CalibrationConfig:
        """Return the same settings with nothing left open, as a record says them."""
        return replace(
            self,
            rank=self.redistribution.rank,
            rho=self.redistribution.rho,
            labels_only=self.labels_only or False,
        )
