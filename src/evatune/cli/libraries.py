"""Keep what other libraries print out of the user's way."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING

from evatune.cli.interrupt import ends_at_once
from evatune.utils.extras import require
from evatune.utils.loggers import quiet_loggers

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def loading_libraries(quiet: bool) -> Iterator[Console]:
    """Yield a console for stderr that shows a spinner while the block imports what a command needs.

    Raises MissingExtraError where results could not be shown in the end.
    """
    require("cli", "this command")
    from rich.console import Console

    quiet_loggers()
    log = Console(stderr=True, quiet=quiet)
    with log.status("loading libraries"), libraries_on_stderr(), ends_at_once():
        yield log


def load_torch() -> None:
    """Import torch, where an interrupt ends the process: nothing is begun yet."""
    with ends_at_once():
        import_module("torch")


@contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[None]:
    """Send the lines that a long run logs to stderr meanwhile, where no bar is drawn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("evatune")
    level = logger.level
    if not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def libraries_on_stderr() -> Iterator[None]:
    """Send to stderr what libraries and workers print meanwhile; stdout is for results."""
    with redirect_stdout(sys.stderr):
        try:
            results = os.dup(1)
            os.dup2(2, 1)
        except OSError:  # one of the two is closed
            yield
            return
        try:
            yield
        finally:
            os.dup2(results, 1)
            os.close(results)
