"""The parts of the benchmarks that need no run, or a tiny one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

_FOLDER = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import `benchmarks/probe_search.py`."""
    yield from _imported("probe_search", monkeypatch)


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import `benchmarks/paired.py`."""
    yield from _imported("paired", monkeypatch)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import `benchmarks/moved.py`."""
    yield from _imported("moved", monkeypatch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import `benchmarks/gpu.py`."""
    yield from _imported("gpu", monkeypatch)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import `benchmarks/probe_tables.py`."""
    yield from _imported("probe_tables", monkeypatch)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import `benchmarks/stop.py`."""
    yield from _imported("stop", monkeypatch)


def _imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(_FOLDER)  # as for a script that lies there
    yield importlib.import_module(name)
    # the scripts alone: torch, say, cannot be imported twice
    for other, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(_FOLDER):
            del sys.modules[other]
