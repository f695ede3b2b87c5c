"""Calibrations of separate shards, whose rows are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import evatune
from evatune import Calibration, CalibrationConfig


class One(nn.Module):
    """One layer, whose input is the batch."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def of_rows(rows: Tensor, **options: Any) -> Calibration:
    """The calibration of one layer on these rows (n, d), in batches of 50."""
    defaults = {"components": 4, "rank": 2, "sketch": "exact", "tolerance": 0, "max_batches": 1000}
    return evatune.calibrate(
        One(rows.shape[1]), list(rows.split(50)), CalibrationConfig(**(defaults | options))
    )


def planted(seed: int, rows: int, d: int = 24, decay: float = 0.7) -> Tensor:
    """(rows, d): few strong directions, of which every seed has its own half, a long tail and a
    mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    basis[:, : d // 2] = torch.eye(d)[:, : d // 2]
    mean = torch.randn(d, generator=generator)
    scales = decay ** torch.arange(d).roll(seed)
    return torch.randn(rows, d, generator=generator) * scales @ basis.T + mean


SHARDS = (planted(0, 150), planted(1, 400), planted(2, 250))


class Routed(nn.Module):
    """Layers that a shard may starve: the first batch names what each gets."""

    def __init__(self, **fates: str) -> None:
        super().__init__()
        self.fates = fates
        for name in fates:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> None:
        for name, fate in self.fates.items():
            rows = {"fine": x, "zero": 0 * x, "few": x[:1], "nan": x / 0, "none": x[:0]}.get(fate)
            if rows is not None:
                getattr(self, name)(rows)


def routed(rows: int = 40, batches: int = 2, seed: int = 0, **fates: str) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(rows, 8, generator=generator) for _ in range(batches)]
    return evatune.calibrate(Routed(**fates), xs, CalibrationConfig(rank=2, tolerance=0))
