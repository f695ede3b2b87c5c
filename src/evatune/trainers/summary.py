"""The summary of a calibration, as scalars for the trackers of a trainer."""

from __future__ import annotations

from collections import Counter
from statistics import median

from evatune.calibration.result import Calibration
from evatune.choices import Scale


def summary(
    calibration: Calibration, scale: Scale, learning_rate: float | None = None
) -> dict[str, float]:
    """Return figures by name, of the redistribution that the calibration's own settings give.

    Args:
        scale: that the adapter was written at.
        learning_rate: of the run; None where it is not known, and then no `evatune/lora_rate`.

    Returns:
        evatune/batches: forward passes.
        evatune/ranks: ranks of all layers.
        evatune/parameters: of A and B.
        evatune/layers: layers with a rank.
        evatune/energy: share in [0, 1] of fresh rows' energy inside a layer's directions, as many
            as its rank, mean over these layers; not there when no layer has a certificate.
        evatune/estimated_missed: share of the best directions' energy that these are expected to
            miss on fresh data; not there where there was nothing to judge by.
        evatune/participation_ratio: `Spectrum.participation_ratio`, median over these layers.
        evatune/step_ratio: κ of `Calibration.step_ratios`, median over these layers; with /least
            and /largest.
        evatune/lora_rate: the rate at which LoRA's first steps would be as long as this run's, κ
            times `learning_rate`.
        evatune/status/…: calibrated layers by status, those that occur.
    """
    plan = calibration.allocate()
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    captured = calibration.captured(ranks).values()
    ratios = calibration.step_ratios(scale, plan).values()
    figures: dict[str, float] = {
        "evatune/batches": calibration.batches,
        "evatune/ranks": sum(ranks.values()),
        "evatune/parameters": plan.parameters,
        "evatune/layers": len(ranks),
        "evatune/participation_ratio": median(
            calibration.spectra[name].participation_ratio for name in ranks
        ),
        "evatune/step_ratio": median(ratios),
        "evatune/step_ratio/least": min(ratios),
        "evatune/step_ratio/largest": max(ratios),
    }
    if learning_rate is not None:
        figures["evatune/lora_rate"] = median(ratios) * learning_rate
    if captured:
        figures["evatune/energy"] = sum(captured) / len(captured)
    if calibration.estimated_missed is not None:
        figures["evatune/estimated_missed"] = calibration.estimated_missed
    return figures | {
        f"evatune/status/{status}": count
        for status, count in Counter(calibration.status.values()).items()
    }
