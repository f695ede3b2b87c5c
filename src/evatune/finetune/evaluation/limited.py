"""Runs a program under limits, as a script of a process of its own: see `programs`.

It says on a pipe how far it came: "ready" once the limits hold, then a word that only its parent
knows once the program has run to its end, or the name of the exception that ended it.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

READY = "ready"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OPEN_FILES = 64
# Beginnings of the names of what Python tells an audit hook: processes, the network, files.
_REFUSED = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile"),
    *("os.kill", "pty.", "subprocess.", "_posixsubprocess.", "socket.", "signal.pthread_kill"),
    *("os.chdir", "os.chflags", "os.chmod", "os.chown", "os.link", "os.lockf", "os.mkdir"),
    *("os.remove", "os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.symlink"),
    *("os.truncate", "os.utime", "shutil.", "tempfile.", "resource."),
)


def limit(seconds: int, memory: int) -> None:
    """Bound this process's time and memory, and forbid it to write, fork or use the network.

    Args:
        seconds: of the processor. memory: bytes of address space.
    """
    for what, most in (
        (resource.RLIMIT_CPU, seconds + 1),  # the parent's clock comes first
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),  # which root is free of
    ):
        resource.setrlimit(what, (most, most))
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise a PermissionError for an audit event that no program of a task needs."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    if writes or event.startswith(_REFUSED):
        raise PermissionError(f"{event} is not allowed here")


def main(program: str, seconds: str, memory: str, pipe: str, word: str) -> None:
    """Run the program in a file; the process ends here, whatever threads it has left."""
    source = Path(program).read_text(encoding="utf-8")
    sys.argv = sys.orig_argv = [program]
    limit(int(seconds), int(memory))
    os.write(int(pipe), READY.encode())
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
    except BaseException as error:  # a program that ends itself has not come to its end
        word = type(error).__name__
    os.write(int(pipe), word.encode())
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
