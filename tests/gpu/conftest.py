"""Where the tests of this folder put their models and rows."""

from __future__ import annotations

import pytest
import torch

GPU = torch.device("cuda", 0)


@pytest.fixture
def device() -> torch.device:
    return GPU
