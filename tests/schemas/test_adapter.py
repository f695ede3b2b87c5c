"""Configs and matrices of saved adapters: what they cannot mean is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from evatune.adapters.export import export_uniform
from evatune.adapters.saved import adapter_rows
from evatune.errors import RecordError
from tests.conftest import Command, refused
from tests.helpers import Toy


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    targets = ["q", "k", "down"]
    config = LoraConfig(
        r=4, target_modules=targets, rank_pattern={r".*\.q": 2}, alpha_pattern={"blocks.0.k": 3}
    )
    get_peft_model(Toy(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        *(({"r": r}, "'r' is") for r in (0, -1, "4", None, [], True, 1.5)),
        ({"lora_alpha": 0}, "'lora_alpha'"),
        ({"lora_alpha": float("nan")}, "'lora_alpha'"),
        ({"use_rslora": "no"}, "'use_rslora'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"q": "8"}}, "alpha_pattern.q"),
        ({"bias": "some"}, "'bias'"),
        ({"r": 7}, "says 7"),
        ({"rank_pattern": {"[": 2}}, "no regular expression"),
        ({"rank_patern": {}}, "'rank_patern'"),
        ({"eva_config": 5}, "is damaged"),
        ({"target_modules": 5}, "target_modules"),
    ],
)
def test_what_a_config_cannot_mean_is_refused_by_inspect_and_export(
    changes: dict[str, Any], part: str, adapter: Path, command: Command
) -> None:
    change_config(adapter, **changes)
    refused(command("inspect", adapter), part)
    refused(
        command("export", adapter, "-o", adapter.parent / "out"),
        part,
        folder=adapter.parent,
        left=frozenset({"adapter"}),
    )


@pytest.mark.parametrize(
    "pattern", ["(.*)*b", "(a|a|[a-z.0-9_]+)+!", ".*.*.*.*.*.*.*.*.*.*.*.*.*!"]
)
def test_a_pattern_that_never_ends_is_refused(
    pattern: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evatune.schemas.adapter._TRIAL_SECONDS", 0.5)
    state = load_file(adapter / "adapter_model.safetensors")
    long = {
        key.replace("blocks", "blocks_of_a_model_with_a_rather_long_name"): value
        for key, value in state.items()
    }
    save_file(long, adapter / "adapter_model.safetensors")
    change_config(adapter, rank_pattern={"q": 2}, alpha_pattern={pattern: 4})
    for read in (
        lambda: adapter_rows(adapter / "adapter_model.safetensors"),
        lambda: export_uniform(adapter, adapter / "out"),
    ):
        with pytest.raises(
            RecordError, match=r"cannot be matched .* within 0\.5 s.*write the names"
        ):
            read()


@pytest.mark.parametrize("how", ["no bytes", "no B", "vector", "whole numbers", "giant"])
def test_matrices_that_are_none_are_refused(how: str, adapter: Path, command: Command) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    a = next(key for key in state if "0.k.lora_A" in key)
    if how == "no bytes":
        state |= {a: torch.zeros(10**9, 0), a.replace("_A", "_B"): torch.zeros(0, 10**9)}
    elif how == "no B":
        del state[a.replace("_A", "_B")]
    elif how == "giant":
        state |= {a: torch.ones(5000, 1), a.replace("_A", "_B"): torch.ones(1, 5000)}
        change_config(adapter, rank_pattern={r".*\.q": 2, "0.k": 5000})
    else:
        state[a] = torch.ones(4) if how == "vector" else torch.ones(4, 16, dtype=torch.int64)
    save_file(state, path)
    refused(
        command("export", adapter, "-o", adapter.parent / "out"),
        folder=adapter.parent,
        left=frozenset({"adapter"}),
    )
