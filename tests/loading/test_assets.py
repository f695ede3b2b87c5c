"""The checkpoints of the package evatune-assets."""

from __future__ import annotations

import hashlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from evatune.errors import DataError, MissingExtraError
from evatune.loading import assets
from evatune.loading.assets import asset

FOLDER = Path(__file__).parents[2] / "assets"


def test_the_checkpoint_fits_its_card() -> None:
    for name in ("llama-small", "vit-glyphs", "dt-metaworld"):
        weights = (asset(name) / "model.safetensors").read_bytes()
        assert len(weights) <= 10_000_000
        assert hashlib.sha256(weights).hexdigest() in (asset(name) / "README.md").read_text(
            encoding="utf-8"
        )
        assert f"\n{name}\n" in (FOLDER / "NOTICE").read_text(encoding="utf-8")


def test_a_checkout_finds_its_own() -> None:
    assert asset("llama-small").is_relative_to(FOLDER)


def test_elsewhere_the_installed_package_is_found_or_its_extra_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "evatune" / "loading" / "assets.py"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "evatune_assets", raising=False)
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # without those of editable installs
    with pytest.raises(MissingExtraError, match=r"'evatune\[recipes\]', or name a model"):
        asset("llama-small")
    (tmp_path / "evatune_assets" / "llama-small").mkdir(parents=True)
    (tmp_path / "evatune_assets" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert asset("llama-small") == tmp_path / "evatune_assets" / "llama-small"
    with pytest.raises(DataError, match="no checkpoint 'gpt'"):
        asset("gpt")
