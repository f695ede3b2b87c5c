"""Saved adapters, read without their model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from evatune.adapters.saved import adapter_rows, is_adapter
from evatune.errors import RecordError
from tests.helpers import Toy, round_trip
from tests.layer_models import Attends, Mixture, Words, routed, sequences, texts

torch.set_num_threads(1)

# PEFT looks for the patterns of parameters among modules only when it warns; it does honour them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
)

WEIGHTS = "adapter_model.safetensors"


def plain(**options: Any) -> PeftModel:
    """The toy model with an adapter as PEFT makes it."""
    torch.manual_seed(0)
    return get_peft_model(Toy(), LoraConfig(r=4, **options))


@pytest.mark.parametrize(
    ("build", "batches", "options"),
    [
        (Words, texts, {"target_modules": ["table", "head"]}),
        (Attends, sequences, {"target_modules": ["attn", "head"]}),
        (
            Mixture,
            routed,
            {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]},
        ),
    ],
)
def test_a_saved_adapter_says_the_rank_and_scale_of_every_kind(
    build: Any, batches: Any, options: Any, tmp_path: Path
) -> None:
    calibration, start = round_trip(
        build, LoraConfig(r=3, lora_alpha=6, **options), batches(), tmp_path
    )
    rows = {row.layer: row for row in adapter_rows(tmp_path / "adapter_model.safetensors")}
    ranks = {
        name.removesuffix(".0"): rank
        for name, rank in calibration.allocate().ranks.items()
        if name[-1] not in "123"
    }
    assert {name: row.rank for name, row in rows.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert {row.scale for row in rows.values()} == {2}
    assert rows.keys() == start.keys()


def test_rank_and_scale_of_an_adapter_of_plain_peft_are_those_that_peft_runs_with(
    tmp_path: Path,
) -> None:
    plain(
        lora_alpha=8, use_rslora=True, target_modules=["q"], rank_pattern={"1.q": 9}
    ).save_pretrained(tmp_path)
    assert [(row.rank, row.scale) for row in adapter_rows(tmp_path / WEIGHTS)] == [
        (4, pytest.approx(4)),
        (9, pytest.approx(8 / 3)),
    ]


def test_ordinary_patterns_keep_the_meaning_that_peft_gives_them(tmp_path: Path) -> None:
    model = plain(
        target_modules=["q", "k", "down"],
        rank_pattern={r".*\.q": 2},
        alpha_pattern={"blocks.0.k": 3},
    )
    model.save_pretrained(tmp_path)
    found = {row.layer: (row.rank, row.alpha) for row in adapter_rows(tmp_path / WEIGHTS)}
    assert (found["blocks.0.q"], found["blocks.0.k"], found["blocks.1.k"]) == (
        (2, 8),
        (4, 3),
        (4, 8),
    )
    path = tmp_path / "adapter_config.json"
    pattern = {r"(?:.*\.)?(blocks\.[01]\.q|nothing|more)+": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": pattern}))
    assert adapter_rows(tmp_path / WEIGHTS)


def test_an_adapter_is_known_by_what_the_file_holds(written: Path, tmp_path: Path) -> None:
    assert is_adapter(written / WEIGHTS)
    assert not is_adapter(written / "calibration.safetensors")
    (tmp_path / WEIGHTS).write_text("no tensors")
    assert not is_adapter(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, r"adapter_config\.json' does not exist"),
        ("{", r"adapter_config\.json' holds no whole JSON.*save the adapter again"),
        ("[]", r"adapter_config\.json' is damaged"),
        ('{"peft_type": "IA3"}', "type 'IA3'.*only LoRA"),
        ("{}", "type None.*only LoRA"),
    ],
)
def test_a_broken_config_is_refused(
    written: Path, tmp_path: Path, config: str | None, text: str
) -> None:
    shutil.copy(written / WEIGHTS, tmp_path)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(RecordError, match=text):
        adapter_rows(tmp_path / WEIGHTS)


@pytest.mark.parametrize("change", ["torn", "without B", "without LoRA"])
def test_broken_weights_are_refused(written: Path, tmp_path: Path, change: str) -> None:
    weights = tmp_path / WEIGHTS
    shutil.copy(written / "adapter_config.json", tmp_path)
    shutil.copy(written / WEIGHTS, weights)
    if change == "torn":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif change == "without B":
        state = load_file(weights)
        save_file({key: value for key, value in state.items() if "lora_B" not in key}, weights)
    else:
        save_file({"other": torch.zeros(2)}, weights)
    with pytest.raises(RecordError, match=r"adapter_model\.safetensors'"):
        adapter_rows(weights)
