"""A calibration of layers whose names are full of signs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import evatune
from tests.helpers import NAMES


class Named(nn.Module):
    """A layer of every name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 4) for name in NAMES})

    def forward(self, x: torch.Tensor) -> None:
        for number, layer in enumerate(self.layers.values(), 1):
            layer(x * number)


@pytest.fixture(scope="module")
def calibration() -> evatune.Calibration:
    batches = [
        torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)
    ]
    return evatune.calibrate(Named(), batches, evatune.CalibrationConfig(rank=2, max_batches=4))
