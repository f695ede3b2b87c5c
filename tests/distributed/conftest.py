"""Two processes that run every scenario once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.scenarios import work
from tests.processes import spawn


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    assert spawn(work, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
