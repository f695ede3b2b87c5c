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


class Build:
    """Builds six numbers, slowly, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, progress: Display) -> dict[str, torch.Tensor]:
        self.calls += 1
        time.sleep(0.2)
        return {"x": torch.arange(6).reshape(2, 3)}


def built(build: Build, version: int = 1) -> list[list[int]]:
    found = cache.build_once("thing", {"version": version}, build, "building", "things")
    return found["x"].tolist()


def test_built_data_is_read_again_and_rebuilt_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    build = Build()
    for _ in range(2):
        assert built(build) == [[0, 1, 2], [3, 4, 5]]
    assert build.calls == 1
    built(build, version=2)
    assert build.calls == 2
    for path in tmp_path.glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    built(build)
    assert build.calls == 3


def test_of_two_that_want_the_same_one_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    build = Build()
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(built, [build, build])) == [[[0, 1, 2], [3, 4, 5]]] * 2
    assert build.calls == 1


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "file"))
    build = Build()
    with pytest.raises(ConfigError, match="name another folder in EVATUNE_CACHE"):
        built(build)
    assert build.calls == 0
