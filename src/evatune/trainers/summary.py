"""The summary of a calibration, as scalars for the trackers of a trainer."""

from __future__ import annotations

from collections import Counter

from evatune.calibration.result import Calibration


def summary(calibration: Calibration) -> dict[str, float]:
    """Return figures by name, of the redistribution that the calibration's own settings give.

    Returns:
        evatune/batches: forward passes.
        evatune/ranks: ranks of all layers.
        evatune/parameters: of A and B.
        evatune/layers: layers with a rank.
        evatune/energy: share in [0, 1] of fresh rows' energy inside a layer's directions, as many
            as its rank, mean over these layers; not there when no layer has a certificate.
        evatune/status/…: calibrated layers by status, those that occur.
    """
    plan = calibration.allocate()
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    captured = calibration.captured(ranks).values()
    figures: dict[str, float] = {
        "evatune/batches": calibration.batches,
        "evatune/ranks": sum(ranks.values()),
        "evatune/parameters": plan.parameters,
        "evatune/layers": len(ranks),
    }
    if captured:
        figures["evatune/energy"] = sum(captured) / len(captured)
    return figures | {
        f"evatune/status/{status}": count
        for status, count in Counter(calibration.status.values()).items()
    }
