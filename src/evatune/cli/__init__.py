"""The command line. Its libraries load inside `main`, where an interrupt is heard meanwhile."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from typing import NoReturn

from evatune.cli.interrupt import SENTENCE, STATUS, Interrupts, ends_at_once
from evatune.errors import MissingExtraError
from evatune.utils.extras import extras
from evatune.utils.launcher import is_main_process
from evatune.utils.markup import printable

_GRACE_SECONDS = 5.0  # for the first process of several, where another has failed


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
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        if status and not is_main_process():
            # The launcher ends all with the first that ends: not before that one has tidied up.
            time.sleep(_GRACE_SECONDS)
        # A thread of gloo, which DDP holds on to, may take the interpreter's end for a crash
        # (pytorch/pytorch#190489).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
