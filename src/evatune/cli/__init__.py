"""The command line. Its libraries load inside `main`, where an interrupt is heard meanwhile."""

from __future__ import annotations

import io
import signal
import sys
from typing import NoReturn

from evatune.cli.interrupt import SENTENCE, STATUS, Interrupts, ends_at_once
from evatune.errors import MissingExtraError
from evatune.utils.extras import extras
from evatune.utils.markup import printable


def main() -> None:
    """Run the command line and exit.

    Status 0, or 2 with one sentence on stderr for the user's mistake, or 130 for an interrupt.
    """
    interrupts = Interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # signs that it cannot show become question marks
            stream.reconfigure(errors="replace")
    try:
        with ends_at_once(), extras("the command line"):
            from evatune.cli.app import run
    except MissingExtraError as error:
        _end(2, str(error))
    try:
        with interrupts.raised():
            status, message = run()
        interrupts.heard = False  # else a library swallowed it, and the command came to its end
    except BaseException as error:
        if not interrupts.heard and not isinstance(error, KeyboardInterrupt):
            raise
        if interrupts.heard:
            # a second one would only tear the sentence
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        status, message = STATUS, SENTENCE
    _end(status, message)


def _end(status: int, message: str) -> NoReturn:
    if message:
        print(f"evatune: {printable(message)}", file=sys.stderr)
    sys.exit(status)
