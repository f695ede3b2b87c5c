"""The door, the arrows between rooms, and what a release must agree on."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterable
from functools import cache
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    packages_distributions,
)
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import evatune
from evatune.utils.extras import EXTRA_OF

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "evatune"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


@pytest.mark.parametrize("arguments", [["--help"], ["init", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    heavy = {"torch", "numpy", "peft", "transformers", "datasets", "matplotlib", "accelerate"}
    code = f"""
import atexit, sys
atexit.register(lambda: print(sorted({heavy} & set(sys.modules)), file=sys.stderr))
from evatune.cli import main
main()
"""
    command = [sys.executable, "-c", code, *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in shown.stdout
    assert shown.stderr.strip() == "[]"


@cache
def imports_of(file: Path) -> set[str]:
    """Return the modules that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "evatune":
            names |= {f"evatune.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def place_of(file: Path) -> str:
    """Return the dotted path of a module below the package."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


def is_in(module: str, places: Collection[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("peft", {"adapters", "finetune.methods"}),
        ("transformers", {"trainers", "loading", "finetune"}),
        ("lightning", {"trainers.lightning"}),
        ("pytorch_lightning", {"trainers.lightning"}),
        ("trl", set()),
        ("datasets", {"loading", "finetune"}),
        ("matplotlib", {"report", "finetune.tasks", "utils.shown"}),  # fonts are drawn, types named
        ("jinja2", {"report", "loading"}),  # loading: the errors of chat templates
        ("vl_convert", {"report.vega"}),
        ("pandas", {"report", "utils.shown"}),  # there for the type checker
        ("IPython", {"utils.progress"}),
        ("typer", {"cli"}),
    ],
)
def test_each_library_is_imported_in_its_rooms_only(library: str, places: set[str]) -> None:
    users = {
        place_of(file)
        for file in SOURCE.rglob("*.py")
        if library in {name.split(".")[0] for name in imports_of(file)}
    }
    assert {user for user in users if not is_in(user, places)} == set()


# room → rooms of ours that it may import; the first ones are the numerical core
BASE = {"errors", "version", "choices", "layers", "utils"}
CORE = {"sketch", "ranks", "scaling"}
ROOMS = {
    "errors": set(),
    "version": set(),
    "choices": {"errors"},
    "layers": set(),
    "utils": {"errors", "version"},
    "sketch": {"errors", "choices", "layers", "utils.shown", "utils.text"},
    "ranks": {"errors", "choices", "layers", "utils.shown", "utils.text", "sketch"},
    "scaling": {"errors", "choices", "sketch.spectrum"},
    # What a file may hold is said in terms of what it is read into.
    "schemas": BASE | {"calibration.config", "calibration.status"},
    "modeling": BASE,
    "capture": BASE | {"modeling", "sketch"},
    "distributed": BASE | {"capture", "modeling", "sketch"},
    "calibration": BASE | CORE | {"schemas", "modeling", "capture", "distributed"},
    "loading": BASE | {"schemas", "modeling"},
    "adapters": BASE
    | CORE
    | {"schemas", "modeling", "capture", "distributed", "calibration", "loading"},
    "trainers": BASE | {"modeling", "capture", "distributed", "calibration", "adapters", "api"},
    "api": BASE | {"modeling", "capture", "distributed", "calibration", "adapters", "trainers.hf"},
    "finetune": BASE
    | CORE
    | {"schemas", "modeling", "capture", "distributed", "calibration", "adapters"}
    | {"trainers", "loading", "api"},
    "report": BASE
    | {"sketch.spectrum", "ranks", "calibration", "adapters.saved", "finetune"}
    | {"loading.cache", "loading.demo"},
}


def test_imports_go_in_the_direction_of_the_data() -> None:
    wrong: list[str] = []
    for file in SOURCE.rglob("*.py"):
        room = place_of(file).split(".")[0]
        if room not in ROOMS:
            assert room in ("cli", "__init__", "__main__"), f"{room} is no room of ROOMS"
            continue
        ours = {name for name in imports_of(file) if name.startswith("evatune.")}
        places = {name.removeprefix("evatune.") for name in ours}
        allowed = ROOMS[room] | {room}
        wrong += [f"{place_of(file)} → {place}" for place in places if not is_in(place, allowed)]
    assert sorted(wrong) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    spec = importlib.util.spec_from_file_location("style", ROOT / "scripts" / "style.py")
    assert spec is not None
    assert spec.loader is not None
    style = importlib.util.module_from_spec(spec)
    sys.modules["style"] = style  # where dataclasses look their module up
    spec.loader.exec_module(style)
    assert style.circles(style.read(SOURCE)) == []


def test_no_test_module_imports_another() -> None:
    for file in (ROOT / "tests").rglob("test_*.py"):
        others = {name for name in imports_of(file) if re.search(r"^tests\..*\btest_", name)}
        assert others <= {f"tests.{file.parent.name}.{file.stem}"}, file.name


def installed_by(requirements: Iterable[str]) -> list[Distribution]:
    """The libraries that `pip install` brings with these requirements."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for one, extra in seen if one == name}:
            seen.add((name, extra))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:  # of another system
                continue
            needed = map(Requirement, found[name].requires or ())
            for one in needed:
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    waiting.append(one)
    return list(found.values())


IMPORTS = """
import importlib, pkgutil, sys
import evatune
from evatune.errors import MissingExtraError

missing = {}
for module in pkgutil.walk_packages(evatune.__path__, "evatune.", onerror=lambda name: None):
    if module.name != "evatune.__main__":
        try:
            importlib.import_module(module.name)
        except MissingExtraError as error:
            missing[module.name] = str(error)
        except ModuleNotFoundError as error:
            missing[module.name] = repr(error)
"""
LIBRARY = f"""
import sys
# Some versions of what the library needs bring these.
sys.modules |= dict.fromkeys(["typer", "rich", "jinja2"])
{IMPORTS}
for module, message in sorted(missing.items()):
    print(module, message, sep="\\t")
"""
RECIPES = f"""{IMPORTS}
from evatune.cli import main
assert missing.keys() == {{"evatune.trainers.lightning"}}, missing
main()
"""


def run_with(requirements: Iterable[str], folder: Path, code: str, *arguments: str) -> str:
    """Run code where no other libraries are than those that pip brings; return its output."""
    site = folder / "site-packages"  # by whose name dill tells libraries from the caller's code
    site.mkdir()
    for library in installed_by(requirements):
        for top in {path.parts[0] for path in library.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(library.locate_file(top))))
    path = os.pathsep.join([str(ROOT / "src"), str(site)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def requirements(*extras: str) -> list[str]:
    """Return what pyproject.toml asks for, of ourselves too."""
    asked = list(PROJECT["dependencies"])
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            ours = re.fullmatch(r"evatune\[(.*)\]", text)
            asked += requirements(*ours[1].split(",")) if ours else [text]
    return asked


def test_what_the_recipes_extra_brings_is_all_that_is_imported(tmp_path: Path) -> None:
    # CorDA, since PEFT imports for it what it does not ask for.
    tiny = ["data.train=8", "data.test=4", "training.steps=1", "training.batch_size=4"]
    arguments = ["train", "generation-arithmetic", "method=corda", *tiny]
    out = str(tmp_path / "run")
    run_with(requirements("recipes"), tmp_path, RECIPES, *arguments, "--out", out)


def test_a_module_whose_extra_is_missing_says_which(tmp_path: Path) -> None:
    lines = run_with(requirements(), tmp_path, LIBRARY).splitlines()
    missing = dict(line.split("\t") for line in lines)
    for module, message in missing.items():
        if module.startswith("evatune.cli."):
            continue  # their one caller, `evatune.cli.main`, says it for them
        assert re.search(r"\w+ is not installed, .* 'evatune\[\w+\]'$", message), module
    rooms = {module.split(".")[1] for module in missing}
    assert rooms <= {"cli", "finetune", "loading", "report", "trainers", "adapters"}
    merged = {"evatune.adapters.export.merged"}
    assert {name for name in missing if name.startswith("evatune.adapters")} <= merged


def test_each_library_of_an_extra_is_in_the_table_of_extras() -> None:
    named = {
        canonicalize_name(Requirement(text).name): extra
        for extra in ("cli", "recipes", "demo", "images", "rl", "ray", "lightning")
        for text in PROJECT["optional-dependencies"][extra]
    }
    named.pop("evatune")
    homes = packages_distributions()
    table = {
        canonicalize_name(homes.get(module, [module])[0]): extra
        for module, extra in EXTRA_OF.items()
    }
    assert table.items() >= named.items()


def test_the_clean_installation_runs_every_command_of_the_readme() -> None:
    script = (ROOT / "scripts" / "clean_install.py").read_text()
    named = set(
        re.findall(
            r"`?evatune (init|inspect|merge|export|train|compare|recipes)\b",
            (ROOT / "README.md").read_text(),
        )
    )
    assert len(named) == 7
    assert all(f"evatune {name} " in script for name in named)
    assert all(f"EXAMPLES/{path.name}" in script for path in (ROOT / "examples").glob("*.py"))


def test_changelog_and_version_agree() -> None:
    newest = re.search(
        r"^## \[(?:Unreleased|(\d\S*))\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert newest is not None
    assert newest.group(1) in (None, evatune.__version__)


def test_the_citation_is_of_this_version_and_its_date() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == evatune.__version__
    heading = f"## [{citation['version']}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text()


def test_links_of_the_readme_lead_somewhere_on_the_package_index_too() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_nothing_unpickles() -> None:
    for file in SOURCE.rglob("*.py"):
        assert "torch.load(" not in file.read_text(), file.name
        assert not imports_of(file) & {"pickle", "dill", "cloudpickle", "joblib"}, file.name
