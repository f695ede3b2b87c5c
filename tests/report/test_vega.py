"""The library in a page, and its place in the cache."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

import pytest
import vl_convert

from evatune.report import vega


def test_the_library_is_built_once_and_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def bundle(snippet: str, vl_version: str) -> str:
        built.append(vl_version)
        return f"// {snippet}"

    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))
    texts = []
    for damage in (False, False, True):
        if damage:
            next((tmp_path / "cache").iterdir()).write_bytes(b"\x1f\x8b half")
        vega.library.cache_clear()
        texts.append(vega.library())
    vega.library.cache_clear()
    assert len(built) == 2
    assert len(set(texts)) == 1
    script = gzip.decompress(base64.b64decode(texts[0])).decode()
    assert script == "// window.vegaEmbed = vegaEmbed"


def test_a_cache_that_cannot_be_written_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda *_, **__: "")
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "file"))
    vega.library.cache_clear()
    assert vega.library()
    vega.library.cache_clear()
