"""Random rows of A: those of PEFT's default, and orthogonal ones.

What is drawn with a seed is drawn on the CPU, where it is the same for all devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# PEFT draws the entries of A from ±1/√in, which have variance 1 / (3·in): rows of length 1/√3.
DEFAULT_LENGTH = 3**-0.5

_CPU = torch.device("cpu")


def seeded_generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator(_CPU).manual_seed(seed)


def default_rows(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Return A (rank, width) float32 as PEFT draws it by default: uniform on ±1/√width."""
    drawn = torch.rand(*shape, generator=generator, dtype=torch.float32, device=_CPU)
    rows: Tensor = (2 * drawn - 1) / shape[1] ** 0.5
    return rows


def orthogonal_rows(shape: Sequence[int], length: float, generator: torch.Generator) -> Tensor:
    """Return orthogonal rows (rank, width) float32 of one length, in random directions."""
    rows = torch.empty(*shape, dtype=torch.float32, device=_CPU)
    return nn.init.orthogonal_(rows, gain=length, generator=generator)
