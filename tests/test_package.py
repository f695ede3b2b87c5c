"""The door, the arrows between rooms, and what a release must agree on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evatune
from evatune import errors

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "evatune"


def test_the_public_names_are_these_and_no_more() -> None:
    assert evatune.__all__ == [
        "Calibration",
        "CalibrationConfig",
        "EvatuneError",
        "Progress",
        "RankPlan",
        "Spectrum",
        "Status",
        "__version__",
        "calibrate",
        "initialize",
    ]


def test_importing_evatune_loads_no_heavy_library() -> None:
    heavy = {
        "torch",
        "numpy",
        "peft",
        "transformers",
        "datasets",
        "matplotlib",
        "jinja2",
        "typer",
        "rich",
        "accelerate",
        "trl",
        "lightning",
    }
    code = f"import sys, evatune; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("peft", {"adapters", "cli"}),
        ("transformers", {"trainers", "tasks", "cli"}),
        ("lightning", {"trainers"}),
        ("pytorch_lightning", {"trainers"}),
        ("trl", set()),
        ("datasets", {"tasks", "cli"}),
        ("matplotlib", {"report", "tasks"}),  # whose fonts are drawn
        ("jinja2", {"report"}),
        ("typer", {"cli"}),
    ],
)
def test_each_library_is_imported_in_its_rooms_only(library: str, rooms: set[str]) -> None:
    users = {
        file.relative_to(SOURCE).parts[0]
        for file in SOURCE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imports_of(file))
    }
    assert users <= rooms


def test_the_numerical_core_knows_nothing_of_models_and_files() -> None:
    core = [SOURCE / "spectrum.py", SOURCE / "ranks.py", *(SOURCE / "sketch").glob("*.py")]
    allowed = {"evatune.spectrum", "evatune.errors", "evatune.sketch"}
    for file in core:
        ours = {name for name in imports_of(file) if name.startswith("evatune")}
        assert all(any(name == a or name.startswith(f"{a}.") for a in allowed) for name in ours), file.name


def test_nobody_but_the_command_line_imports_the_report() -> None:
    users = {
        file.relative_to(SOURCE).parts[0]
        for file in SOURCE.rglob("*.py")
        if any(name.startswith("evatune.report") for name in imports_of(file))
    }
    assert users <= {"report", "cli"}


def test_every_error_has_the_same_root_and_is_drawn_in_the_tree() -> None:
    ours = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert all(issubclass(e, evatune.EvatuneError) for e in ours)
    assert all(e.__name__ in (errors.__doc__ or "") for e in ours)


def test_changelog_and_version_agree() -> None:
    newest = re.search(r"^## \[(?:Unreleased|(\d\S*))\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) in (None, evatune.__version__)


def test_nothing_unpickles() -> None:
    for file in SOURCE.rglob("*.py"):
        assert "torch.load(" not in file.read_text(), file.name
        assert not imports_of(file) & {"pickle", "dill", "cloudpickle", "joblib"}, file.name
