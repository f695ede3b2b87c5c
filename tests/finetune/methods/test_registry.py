"""The registry of methods."""

from __future__ import annotations

import pytest
import torch

from evatune.errors import ConfigError
from evatune.finetune.methods import find_method

torch.set_num_threads(1)


def test_loftq_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="'loftq' starts an adapter from the error of quantizing"):
        find_method("loftq")
