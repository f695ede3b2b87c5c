"""Runs programs that a model wrote, each in a process of its own under limits.

The limits keep mistakes from doing harm: a program has no input, an empty folder, few variables of
the environment, a bounded share of processor and memory, and an end; Python refuses it files to
write, processes and the network. That is no wall against a program that means harm: it can read
what the user can read, and an audit hook stops Python's own functions only. Whoever does not trust
a model runs this in a container without secrets.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from evatune.errors import ProcessError
from evatune.finetune.evaluation import limited

PASSED = "passed"
OUT_OF_TIME = "out of time"
ENDED_EARLY = "ended early"
_TO_START = 60  # seconds of a process, on a machine that does much else
_LONGEST = 1000  # bytes that are read of what a process says
_ENVIRONMENT = {
    "PATH": os.defpath,
    "LANG": "C.UTF-8",
    # else libraries of algebra start a thread for each core, which the limits refuse
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


@dataclass(frozen=True)
class Limits:
    """The most that a program may use.

    Attributes:
        seconds: by the clock, and of the processor. memory: bytes of address space.
    """

    seconds: int = 10
    memory: int = 4 << 30


_USUAL = Limits()


def outcome(program: str, limits: Limits = _USUAL) -> str:
    """Run a program of Python and return how it ended.

    Returns:
        `PASSED` where it ran to its last line; `OUT_OF_TIME`; `ENDED_EARLY` where the process was
            gone before; else the name of the exception that ended it.

    Raises ProcessError where the limits cannot be set on this system.
    """
    word = secrets.token_hex(16)
    last, ended = _run(program, limits, word)
    if last == word:
        return PASSED
    if not ended:
        return OUT_OF_TIME
    return last if last.isidentifier() else ENDED_EARLY


def _run(program: str, limits: Limits, word: str) -> tuple[str, bool]:
    """Return the last that a program's process said, and whether it ended by itself."""
    with tempfile.TemporaryDirectory() as folder, _pipe() as (reading, writing):
        file, work = Path(folder, "program.py"), Path(folder, "work")
        file.write_text(program, encoding="utf-8", errors="replace")
        work.mkdir()
        settings = [limits.seconds, limits.memory, writing.fileno(), word]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", limited.__file__, str(file), *map(str, settings)],
            cwd=work,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # it may have no end
            stderr=subprocess.DEVNULL,
            pass_fds=[writing.fileno()],
            start_new_session=True,
        )
        writing.close()  # so that the process's end is the pipe's
        try:
            said, ended = _read(reading, _TO_START, len(limited.READY))
            if said != limited.READY:
                raise ProcessError(
                    "generated code is not run, as it cannot be limited on this machine: the"
                    f" process of a program {_how_it_failed(ended)}; leave out humaneval and mbpp,"
                    " or run this on Linux after `ulimit -v unlimited`"
                )
            return _read(reading, limits.seconds, _LONGEST)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _how_it_failed(ended: bool) -> str:
    return "ended before its start" if ended else f"did not start in {_TO_START} seconds"


@contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as source, open(writing, "wb", buffering=0) as target:
        yield source, target


def _read(pipe: BinaryIO, seconds: float, most: int) -> tuple[str, bool]:
    """Return at most so many bytes as text, and whether the pipe came to its end or to those."""
    said, deadline = b"", time.monotonic() + seconds
    while len(said) < most:
        readable, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
        piece = pipe.read(most - len(said)) if readable else b""
        said += piece
        if not piece:
            return said.decode(errors="replace"), bool(readable)
    return said.decode(errors="replace"), True
