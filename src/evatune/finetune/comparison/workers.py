"""Run calls in worker processes: every call gets an answer, and no process is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pkgutil import resolve_name
from typing import Any, NoReturn, cast

from evatune.errors import EvatuneError
from evatune.utils.loggers import quiet_loggers

_GRACE_SECONDS = 5.0  # seconds for a worker to leave by itself before it is killed
Call = tuple[Any, ...]  # the arguments of one call


@dataclass(frozen=True)
class Answer:
    """The outcome of one call: its result, or that its process died."""

    number: int  # of the call
    result: Any = None
    died: bool = False


def run_calls(
    function: Callable[..., Any],
    calls: Iterable[Call | None],
    workers: int,
) -> Generator[Answer]:
    """Yield an answer to each call, in the order in which they end.

    A worker makes call after call, since it takes seconds to import torch. One that dies is
    replaced, and only its own call is lost. When the iterator is closed, or an interrupt comes,
    all workers end within seconds.

    Args:
        function: importable by name; it raises nothing.
        calls: taken one by one as workers become free, so that they may depend on the answers so
            far; None where none can be made before the next answer.
        workers: processes at a time, each with one thread of OpenMP.
    """
    context = multiprocessing.get_context("spawn")
    waiting = iter(calls)
    numbers = count()
    # A process is in here before it starts: an interrupt may come at any line.
    processes: dict[Connection, BaseProcess] = {}
    idle: list[Connection] = []
    current: dict[Connection, int] = {}

    def begin() -> None:
        """Give calls to as many workers as may work."""
        while len(current) < max(1, workers) and (call := next(waiting, None)) is not None:
            if idle:
                connection = idle.pop()
            else:
                connection, worker_end = context.Pipe()
                arguments = (worker_end, f"{function.__module__}:{function.__qualname__}")
                processes[connection] = context.Process(target=_serve, args=arguments)
                with _start_settings():
                    processes[connection].start()
                worker_end.close()
            with suppress(OSError):  # it is dead, and no answer will come
                connection.send(call)
            current[connection] = next(numbers)

    try:
        while True:
            begin()
            if not current:
                return
            for ready in cast("list[Connection]", wait(list(current))):
                number = current.pop(ready)
                try:
                    answer = Answer(number, ready.recv())
                    idle.append(ready)
                except (EOFError, OSError):
                    answer = Answer(number, died=True)
                    _end([processes[ready]])
                begin()  # whoever takes the answer may take long
                yield answer
    finally:
        _end(processes.values())


def problem_of(error: Exception) -> str:
    """Return what went wrong, in one sentence where evatune raised it."""
    return str(error) if isinstance(error, EvatuneError) else f"{type(error).__name__}: {error}"


@contextmanager
def _start_settings() -> Iterator[None]:
    """Have processes that start in the block use one OpenMP thread and ignore Ctrl-C.

    torch reads the number of threads when it is imported. A terminal sends Ctrl-C to all processes:
    this one ends the others, each of which would answer with a traceback.
    """
    resource_tracker.ensure_running()  # else it starts within, and lets interrupts through again
    threads = os.environ.get("OMP_NUM_THREADS")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.environ["OMP_NUM_THREADS"] = "1"
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end(processes: Collection[BaseProcess]) -> None:
    """Terminate the processes, which then clean up and end their children; kill what remains."""
    started = [process for process in processes if process.pid is not None]
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in started:
        process.terminate()
    try:
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # also at a second interrupt
        for process in started:
            process.kill()
            process.join(_GRACE_SECONDS)


def _serve(connection: Connection, name: str) -> None:
    """Answer calls of the function of this name, in a worker, until the parent ends it."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    quiet_loggers()  # before the function's module imports what they belong to
    function = resolve_name(name)
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            connection.send(function(*connection.recv()))


def _leave(*_: Any) -> NoReturn:
    sys.exit()


def _die_with_parent() -> None:
    """End this worker once its parent has died: the next command would repeat its call."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
