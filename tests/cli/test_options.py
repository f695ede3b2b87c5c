"""Options of a command as the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from evatune.calibration.config import CalibrationConfig
from evatune.cli.compare_options import CompareOptions
from evatune.cli.init_options import InitOptions
from evatune.cli.options import (
    argument,
    config_of,
    option,
    recipe_names,
    setting,
    takes_options,
)


@dataclass(frozen=True)
class Options:
    out: Path = option("-o", "--out", default=Path("here"), help="Where.", panel="Output")
    seed: int = setting(CalibrationConfig, "seed", panel="Numbers")
    quiet: bool = option("--quiet", default=False, help="Say less.", panel="Output")


def test_every_field_is_an_option_with_its_type_and_help() -> None:
    seen: list[Options] = []
    app = typer.Typer()

    @app.command()
    @takes_options(Options)
    def command(options: Options) -> None:
        """Do it."""
        seen.append(options)

    runner = CliRunner()
    assert runner.invoke(app, []).exit_code == 0
    assert runner.invoke(app, ["-o", "there", "--seed", "3", "--quiet"]).exit_code == 0
    assert runner.invoke(app, ["--seed", "three"]).exit_code == 2
    assert seen == [Options(), Options(Path("there"), 3, True)]
    shown = runner.invoke(app, ["--help"]).output
    assert all(text in shown for text in ("Do it.", "Where.", "Numbers", "new weights"))


@dataclass(frozen=True)
class Arguments:
    names: list[str] = argument(help="Which.", autocompletion=recipe_names)
    count: int | None = option(default=None, help="How many.", least=1)


def test_an_argument_is_required_and_a_number_has_its_bound() -> None:
    seen: list[Arguments] = []
    app = typer.Typer()

    @app.command()
    @takes_options(Arguments)
    def command(options: Arguments) -> None:
        seen.append(options)

    runner = CliRunner()
    assert runner.invoke(app, []).exit_code == 2
    assert runner.invoke(app, ["one", "--count", "0"]).exit_code == 2
    assert runner.invoke(app, ["one", "two", "--count", "1"]).exit_code == 0
    assert seen == [Arguments(["one", "two"], 1)]


def test_settings_of_init_are_the_fields_of_the_config_and_reach_it() -> None:
    options = InitOptions(rank=3, center=True, tolerance=0.5)
    config = config_of(CalibrationConfig, options)
    assert config == CalibrationConfig(rank=3, rho=2.0, center=True, tolerance=0.5)


@pytest.mark.parametrize("options", [InitOptions, CompareOptions])
def test_every_option_has_a_help_text(options: Any) -> None:
    assert all(each.metadata["option"].help for each in fields(options))
