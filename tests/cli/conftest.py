"""`evatune init` on a tiny model, in an empty folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.conftest import Answer, Command

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "calibration.safetensors",
    "evatune.json",
    "ranks.png",
    "report.html",
    "run.json",
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in; what is written, is written here."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture
def init(command: Command, bert_folder: Path, text_file: Path, work: Path) -> Command:
    """`evatune init` on the tiny model and texts; keywords replace options, None leaves one out,
    True is a flag."""

    def run(**options: Any) -> Answer:
        chosen = {"model": bert_folder, "data": text_file, "rank": 4, "out": "out"} | options
        arguments: list[Any] = []
        for name, value in chosen.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        return command("init", *arguments)

    return run
