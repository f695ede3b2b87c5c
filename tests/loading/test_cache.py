"""Data that is built once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.loading import cache

torch.set_num_threads(1)


def test_built_data_is_read_again_and_rebuilt_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path))
    calls: list[int] = []

    def build() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.arange(6).reshape(2, 3)}

    for _ in range(2):
        assert cache.build_once("thing", {"version": 1}, build)["x"].tolist() == [
            [0, 1, 2],
            [3, 4, 5],
        ]
    assert len(calls) == 1
    cache.build_once("thing", {"version": 2}, build)
    assert len(calls) == 2
    for path in tmp_path.iterdir():
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    cache.build_once("thing", {"version": 1}, build)
    assert len(calls) == 3
