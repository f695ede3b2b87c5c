"""Calls that take as good as forever, and processes that make them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[3]
# Ray's workers are of low priority, and hardly begin beside others that compute.
PRIORITY = {"RAY_worker_niceness": "0"}
QUICK = 2  # runs of a comparison; all others take as good as forever


def say(folder: str, number: int, *processes: int) -> None:
    part = Path(folder) / f"{number}.part"
    part.write_text(" ".join(map(str, processes)))
    part.rename(Path(folder) / str(number))


def linger(folder: str, number: int) -> None:
    """Take as good as forever, with a process of its own."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        try:
            say(folder, number, os.getpid(), child.pid)
            time.sleep(600)
        finally:
            child.kill()


def run_or_linger(tree: dict[str, Any], folder: str) -> str | None:
    """Do one of the quick runs; of all others stand for one."""
    from evatune.finetune.comparison.grid import _run_in_worker

    if tree["seed"] < QUICK:
        return _run_in_worker(tree, folder)
    linger(str(Path(folder).parents[1]), tree["seed"])
    return None


def told_by_calls(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and path.suffix != ".part"]


def begun(
    folder: Path, count: int, parent: subprocess.Popen[str] | None = None
) -> list[psutil.Process]:
    """Return the processes of `count` calls, once they are at it."""
    deadline = time.monotonic() + 600  # a machine that computes other things takes minutes
    while len(files := told_by_calls(folder)) < count:
        assert time.monotonic() < deadline
        assert parent is None or parent.poll() is None, parent.communicate()
        time.sleep(0.02)
    return [psutil.Process(int(pid)) for path in files for pid in path.read_text().split()]


def require_gone(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


@contextmanager
def parent(
    code: str, folder: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A process that runs `code` and has begun two calls of `linger`; what these run in."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *arguments],
        cwd=ROOT,
        env=variables | PRIORITY | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process, begun(folder, 2, process)
    finally:
        process.kill()
        process.communicate()
