"""The registry of methods."""

from __future__ import annotations

import pytest
import torch

from evatune.errors import ConfigError
from evatune.finetune.methods import METHODS, find_method

torch.set_num_threads(1)


def test_what_is_no_competitor_of_eva_says_so() -> None:
    roles: dict[str, set[str]] = {}
    for method in METHODS.values():
        roles.setdefault(method.role, set()).add(method.name)
    assert roles["reference"] == {"full", "head", "lora", "untouched"}
    assert {"eva-fa", "eva-minor", "lora-orthogonal", "lora-redist"} < roles["control"]
    assert {"eva", "eva-dora", "eva-paper-centered"} < roles["eva"]
    assert not any(name.startswith("eva") for name in roles["competitor"])
    described = {m.name for m in METHODS.values() if m.about.startswith("control:")}
    assert described <= roles["control"]


def test_loftq_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="'loftq' starts an adapter from the error of quantizing"):
        find_method("loftq")
