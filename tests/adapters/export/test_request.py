"""A request for an export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from evatune.adapters.export import ExportRequest, export_adapter
from evatune.errors import ConfigError
from tests.helpers import Toy


def test_a_request_replaces_nothing_and_runs_no_foreign_code_unless_told_to() -> None:
    request = ExportRequest(Path("adapter"), Path("out"))
    assert (request.overwrite, request.trust_remote_code, request.model) == (False, False, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.overwrite = True  # type: ignore[misc]


def test_the_facts_of_an_export_can_be_written_as_json(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["q"]))
    model.save_pretrained(tmp_path / "adapter")
    request = ExportRequest(tmp_path / "adapter", tmp_path / "out")
    exported = export_adapter("uniform", request)
    assert exported.summary.strip()
    assert json.loads(json.dumps(exported.facts, allow_nan=False)).keys() == exported.facts.keys()
    with pytest.raises(ConfigError, match="out' exists"):
        export_adapter("uniform", request)
