"""The benchmark of the stop rule, on a model that is too small to mean anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def small(stop: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module with streams of eight batches."""
    monkeypatch.setattr(stop, "MOST", 8)
    every = {name: lambda: stop.random_llama(32, 16, 16, layers=1) for name in ("tiny", "news")}
    monkeypatch.setattr(stop, "STREAMS", every)
    return stop


def run(stop: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, *streams: str) -> None:
    options = ["--streams", *streams, "--output", str(output), "--peft-seconds", "0.2"]
    monkeypatch.setattr(sys, "argv", ["stop.py", *options])
    stop.main()


def test_streams_are_measured_once_and_summed_up(
    small: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    run(small, monkeypatch, tmp_path / "stop.json", "tiny")
    measured: list[str] = []
    measure = small.measure
    monkeypatch.setattr(
        small, "measure", lambda *arguments: measured.append("") or measure(*arguments)
    )
    run(small, monkeypatch, tmp_path / "stop.json", "tiny", "news")
    assert len(measured) == 1
    found = json.loads((tmp_path / "stop.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    for one in found["streams"].values():
        assert one["batches"] == 8
        assert 0.5 < one["captured_worst"] <= one["captured"] < 1
        assert 0 < one["estimated_missed"] < 1
        assert not one["peft_finished"]
        assert 0.5 < one["peft_captured_centered"] < 1
        assert one["batches_to_peft"] in (1, 2, 3, 4, 6, 8, None)
    assert found["summary"]["least_captured"] == min(
        one["captured"] for one in found["streams"].values()
    )
