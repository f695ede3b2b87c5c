"""Outcomes of a layer's calibration, by name."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """A named outcome per layer; compares equal to its text, and `advice` says what to do next."""

    CONVERGED = "converged"
    UNSETTLED = "unsettled"
    MAX_BATCHES = "max_batches_reached"
    DATA_EXHAUSTED = "data_exhausted"
    DRIFTING = "drifting"
    SELDOM_ROUTED = "seldom_routed"
    TOO_FEW_ROWS = "too_few_rows"
    NO_SIGNAL = "no_signal"
    NON_FINITE = "non_finite"
    NEVER_CALLED = "never_called"

    @property
    def usable(self) -> bool:
        """True if an adapter can be initialized from this layer's spectrum."""
        return self in (
            Status.CONVERGED,
            Status.UNSETTLED,
            Status.MAX_BATCHES,
            Status.DATA_EXHAUSTED,
            Status.DRIFTING,
            Status.SELDOM_ROUTED,
        )

    @property
    def advice(self) -> str:
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "directions and ranks have settled; nothing to do",
    Status.UNSETTLED: (
        "usable: the mean over all layers has settled; a smaller tolerance settles single ones too"
    ),
    Status.MAX_BATCHES: (
        "usable, but still moving at max_batches; raise max_batches if the captured energy matters"
    ),
    Status.DATA_EXHAUSTED: "usable, but the data ended first; give more batches if there are any",
    Status.DRIFTING: (
        "usable, but later batches were captured worse than the earlier ones had promised, so the"
        " data comes sorted, and what has not been read may differ again; shuffle the examples"
        " before they become batches"
    ),
    Status.SELDOM_ROUTED: (
        "usable; fewer tokens than components were routed here, so the other rows of A are"
        " random (orthonormal); give more data if such an expert matters"
    ),
    Status.TOO_FEW_ROWS: (
        "fewer rows than components came; give more data, or lower rank or rho (in Python"
        " components too); where only tokens with a loss count, see that some labels are not -100"
    ),
    Status.NO_SIGNAL: (
        "every input was zero (with center=True, the same; where the objective sees gradients,"
        " every gradient was zero); check the data, or leave the layer out with exclude_modules"
    ),
    Status.NON_FINITE: (
        "NaN or Inf came in (or back, as a gradient); check the batch named, or use float32 or"
        " bfloat16 instead of float16"
    ),
    Status.NEVER_CALLED: (
        "never reached by the forward pass; leave out with exclude_modules, or pass forward="
    ),
}


def shortage(rows: int, total_energy: float, needed: int) -> Status | None:
    """Return the status of a layer whose rows do not suffice for `needed` directions, or None."""
    if rows == 0:
        return Status.TOO_FEW_ROWS
    if total_energy == 0:
        return Status.NO_SIGNAL
    return Status.TOO_FEW_ROWS if rows < needed else None
