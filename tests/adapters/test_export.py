"""The registry of export formats."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from evatune.adapters.export import FORMATS, Exported, ExportFormat, ExportRequest, export_adapter
from evatune.errors import ConfigError
from tests.conftest import Command


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format of one function and one line of the registry."""

    def write(request: ExportRequest) -> Exported:
        request.out.write_text("toy")
        return Exported("a toy", {"size": 3})

    module = ModuleType("toy_format")
    module.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_format", module)
    monkeypatch.setitem(FORMATS, "toy", ExportFormat("a toy", "toy_format"))


def test_a_new_format_is_a_module_and_a_line(toy: None, tmp_path: Path) -> None:
    exported = export_adapter("toy", ExportRequest(tmp_path, tmp_path / "out"))
    assert exported == Exported("a toy", {"size": 3})
    assert (tmp_path / "out").read_text() == "toy"


def test_the_command_line_knows_a_new_format(toy: None, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = command("export", tmp_path, "-o", out, "--format", "toy")
    assert answer.out == f"{out}  a toy\n"


def test_a_format_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format is 'gguf'; choose one of uniform, merged"):
        export_adapter("gguf", ExportRequest(tmp_path, tmp_path / "out"))
