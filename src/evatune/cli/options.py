"""Options: those that commands share, and those of a command as one frozen dataclass."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Config = TypeVar("Config")
Options = TypeVar("Options")

TRUST_HELP = "Run Python code that comes with the model. Look at it first."
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)]


def recipe_names(incomplete: str) -> list[str]:
    """Return the recipes of ours whose names begin with what is there: completions for Tab."""
    from evatune.finetune.recipe_files import bundled_recipes

    return [name for name in bundled_recipes() if name.startswith(incomplete)]


def split_names(text: str) -> list[str]:
    """Return what stands between the commas of an option, without spaces around it."""
    return [part.strip() for part in text.split(",") if part.strip()]


def this_command() -> str:
    """Return the command line as the user gave it."""
    return shlex.join(["evatune", *sys.argv[1:]])


def argument(*, help: str, autocompletion: Callable[[str], list[str]]) -> Any:
    """Return a dataclass field that is a required argument of a command."""
    info = typer.Argument(help=help, autocompletion=autocompletion)
    return field(metadata={"option": info})


def option(
    *names: str, default: Any, help: str, panel: str | None = None, least: int | None = None
) -> Any:
    """Return a dataclass field that is an option of a command.

    Args:
        names: on the command line; "--" and the field's name where none is given.
        panel: heading of the box of `--help` in which it stands, if not with all others.
        least: bound of a number.
    """
    info = typer.Option(*names, help=help, rich_help_panel=panel, min=least)
    return field(default=default, metadata={"option": info})


def setting(config: type, name: str, *names: str, panel: str, default: Any = MISSING) -> Any:
    """Return a field that is an option for the field `name` of the dataclass `config`.

    Its help is that field's, and so is its default, unless another one is given.
    """
    source: Field[Any] = next(each for each in fields(config) if each.name == name)
    chosen = source.default if default is MISSING else default
    return option(*names, default=chosen, help=source.metadata["help"], panel=panel)


def config_of(config: type[Config], options: Any, **others: Any) -> Config:
    """Return the `config` whose fields have the values of the options of the same names.

    Args:
        others: values of fields that have no such option, or another value than it.
    """
    of_config: Any = config
    names = {each.name for each in fields(of_config)} & {each.name for each in fields(options)}
    return config(**{name: getattr(options, name) for name in names} | others)


def takes_options(
    options: type[Options],
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Return a decorator for a function of one `options`, which makes it a command of many."""
    types = get_type_hints(options)
    parameters = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=Annotated[types[each.name], each.metadata["option"]],
        )
        for each in fields(options)  # type: ignore[arg-type]
    ]

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(options(**values))

        # Typer reads the signature, and asks the annotations for what stands in it as text.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate
