"""The command line: a thin skin. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from evatune.cli.init import init
from evatune.cli.inspect import inspect
from evatune.version import __version__

app = typer.Typer(
    help="Start a LoRA adapter from what your data says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(init)
app.command()(inspect)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: status 0, or 2 with one sentence on stderr for the user's mistake."""
    from evatune.errors import EvatuneError

    try:
        app()
    except EvatuneError as error:
        print(f"evatune: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evatune: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
