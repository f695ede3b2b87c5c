"""A small policy, and a cache of demonstrations for these tests alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evatune.finetune.tasks.rl.simulator import load_metaworld


@pytest.fixture(scope="package", autouse=True)
def _with_simulator() -> None:
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("robot tasks need the rl extra")


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVATUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.DecisionTransformerConfig(
        state_dim=39,
        act_dim=4,
        hidden_size=32,
        n_layer=2,
        n_head=2,
        max_ep_len=16,
        n_positions=48,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("models") / "dt"
    transformers.DecisionTransformerModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    load_metaworld()
    import mujoco

    def refuse(*_: Any) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(mujoco, "Renderer", refuse)
