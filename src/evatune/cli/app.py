"""The commands: a thin skin. Heavy imports happen inside them."""

from __future__ import annotations

import errno
from typing import Annotated, cast

import typer

from evatune.cli.compare import compare
from evatune.cli.evaluate import evaluate
from evatune.cli.export import export
from evatune.cli.hints import sentence
from evatune.cli.init import init
from evatune.cli.inspect import inspect
from evatune.cli.interrupt import STATUS
from evatune.cli.merge import merge
from evatune.cli.methods import methods
from evatune.cli.push import push
from evatune.cli.recipes import recipes
from evatune.cli.train import train
from evatune.utils.extras import extras
from evatune.version import __version__

# Typer carries its own copy of click, or needs the package, depending on its version; this is
# either's root.
_UsageMistake = cast("type[Exception]", typer.BadParameter.__mro__[2])
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM_OR_RIGHTS = (*_ROOM, errno.EACCES, errno.EPERM, errno.EROFS)

app = typer.Typer(
    help="Start a LoRA adapter from what your data says.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(init)
app.command()(inspect)
app.command()(merge)
app.command()(train)
app.command()(compare)
app.command()(evaluate)
app.command()(export)
app.command()(push)
app.command()(methods)
app.add_typer(recipes, name="recipes")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run() -> tuple[int, str]:
    """Run the command that the arguments name.

    Returns its exit status, and the sentence for the user's mistake or "".
    """
    from evatune.errors import EvatuneError

    try:
        # Typer on its own would draw a box of several lines, and end on an interrupt without a
        # word.
        with extras("this command"):
            status = app(prog_name="evatune", standalone_mode=False) or 0
    except EvatuneError as error:
        return 2, str(error)
    except _UsageMistake as error:
        return 2, sentence(error)
    except OSError as error:
        return 2, _refused_by_system(error)
    except typer.Abort as error:  # an interrupt, as some versions of Typer pass it on
        raise KeyboardInterrupt from error
    if status == STATUS:  # and others
        raise KeyboardInterrupt
    return status, ""


def _refused_by_system(error: OSError) -> str:
    """Return what the system, or a library that reads files, refused, and what to do."""
    what = f" {str(error.filename)!r}" if error.filename else ""
    reason = error.strerror or error
    advice = "make room or rights" if error.errno in _ROOM_OR_RIGHTS else "see to that"
    return f"cannot read or write{what} ({reason}); {advice}, then run the command again"
