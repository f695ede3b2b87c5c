"""Ctrl-C: one line and status 130, whenever it comes.

Nothing but the standard library loads here.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 130
SENTENCE = (
    "interrupted; train and compare go on when run again, another command has written nothing"
)
_SHOW_CURSOR = "\r\x1b[2K\x1b[?25h"  # a spinner hides it


class Interrupts:
    """A listener that hears Ctrl-C, and ends the process with our status."""

    def __init__(self) -> None:
        self.heard = False
        # Registered before any library registers something, and so called after all of them. A
        # KeyboardInterrupt that passed through code which an extension module ran makes Python kill
        # itself with SIGINT at its end.
        atexit.register(self._end)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise KeyboardInterrupt where an interrupt reaches the block."""

        def note(*_: object) -> None:
            self.heard = True
            raise KeyboardInterrupt

        with _handled(note):
            yield

    def _end(self) -> None:
        if self.heard:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STATUS)


@contextmanager
def ends_at_once() -> Iterator[None]:
    """End the process where an interrupt reaches the block, which only loads libraries.

    Nothing is there to tidy up. torch's extension modules abort when a KeyboardInterrupt comes
    while they load.
    """

    def end(*_: object) -> None:
        os.write(2, f"{_SHOW_CURSOR if os.isatty(2) else ''}evatune: {SENTENCE}\n".encode())
        os._exit(STATUS)

    with _handled(end):
        yield


@contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # as a shell asks of a job in the background
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
