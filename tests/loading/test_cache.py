"""Data that is built once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from evatune.errors import ConfigError
from evatune.loading import cache
from evatune.utils.progress import Display

torch.set_num_threads(1)


def test_built_data_is_read_again_and_rebuilt_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    calls: list[int] = []

    def build(progress: Display) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.arange(6).reshape(2, 3)}

    for _ in range(2):
        assert cache.build_once("thing", {"version": 1}, build, "building", "things")[
            "x"
        ].tolist() == [
            [0, 1, 2],
            [3, 4, 5],
        ]
    assert len(calls) == 1
    cache.build_once("thing", {"version": 2}, build, "building", "things")
    assert len(calls) == 2
    for path in tmp_path.glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    cache.build_once("thing", {"version": 1}, build, "building", "things")
    assert len(calls) == 3


def test_of_two_that_want_the_same_one_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    calls: list[int] = []

    def build(progress: Display) -> dict[str, torch.Tensor]:
        calls.append(1)
        time.sleep(0.2)
        return {"x": torch.ones(1)}

    def built(_: int) -> float:
        return cache.build_once("thing", {}, build, "building", "things")["x"].item()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(built, range(2))) == [1.0, 1.0]
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "file"))

    def build(progress: Display) -> dict[str, torch.Tensor]:
        raise AssertionError

    with pytest.raises(ConfigError, match="name another folder in EVATUNE_CACHE"):
        cache.build_once("thing", {}, build, "building", "things")
