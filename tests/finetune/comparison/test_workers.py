"""Calls in processes of their own: who answers, who dies, who ends whom."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from evatune.finetune.comparison.workers import run_calls

ROOT = Path(__file__).parents[3]


# -- what the workers call ---------------------------------------------------------------------


def perhaps_die(number: int, fate: str | None = None) -> tuple[int, int, str]:
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "left":
        os._exit(0)
    return number, os.getpid(), os.environ["OMP_NUM_THREADS"]


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


def stay_or_go(folder: str, number: int) -> None:
    """End the first call; take as good as forever over the others, deaf to who asks for an end."""
    if number:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(folder, number, os.getpid())
        time.sleep(600)


def cell(tree: dict[str, Any], folder: str) -> None:
    """Stand for a cell of a comparison that takes as good as forever."""
    linger(str(Path(folder).parent), tree["seed"])


# -- answers -----------------------------------------------------------------------------------


def test_every_call_is_answered_and_a_death_loses_its_own_call_only() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    fates = {2: "killed", 3: "left"}
    answers = list(run_calls(perhaps_die, [(number, fates.get(number)) for number in range(7)], 2))
    assert {answer.number for answer in answers if answer.died} == fates.keys()
    results = {answer.number: answer.result for answer in answers if not answer.died}
    assert sorted(results) == [0, 1, 4, 5, 6]
    assert all(number == result[0] for number, result in results.items())
    processes = {process for _, process, _ in results.values()}
    assert len(processes - {os.getpid()}) <= 4  # two, and two in the place of the dead
    assert {threads for _, _, threads in results.values()} == {"1"}
    assert os.environ.get("OMP_NUM_THREADS") == before


# -- ends --------------------------------------------------------------------------------------


def begun(
    folder: Path, count: int, parent: subprocess.Popen[str] | None = None
) -> list[psutil.Process]:
    """Return the processes of `count` calls, once they are at it."""
    deadline = time.monotonic() + 180
    while len(files := [path for path in folder.iterdir() if path.suffix != ".part"]) < count:
        assert time.monotonic() < deadline
        assert parent is None or parent.poll() is None, parent.communicate()
        time.sleep(0.02)
    return [psutil.Process(int(pid)) for path in files for pid in path.read_text().split()]


def require_gone(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


OURS = """
import sys
from evatune.finetune.comparison.workers import run_calls
from tests.finetune.comparison.test_workers import linger
for answer in run_calls(linger, [(sys.argv[1], number) for number in range(4)], 2):
    print(answer)
"""


@contextmanager
def parent(code: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A process that runs `code` and has begun two of its four calls; what these run in."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env=variables | {"PYTHONPATH": os.pathsep.join(sys.path)},
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


def test_an_interrupt_ends_all_at_once_and_begins_nothing(tmp_path: Path) -> None:
    with parent(OURS, tmp_path) as (process, calls):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        out, errors = process.communicate(timeout=15)
        require_gone(calls, 0)
    assert out == ""
    assert errors.count("Traceback") == 1  # the parent's own
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_no_worker_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    with parent(OURS, tmp_path) as (process, calls):
        process.kill()
        process.communicate(timeout=15)
        require_gone(calls, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_a_worker_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    answers = run_calls(stay_or_go, [(str(tmp_path), number) for number in range(3)], 2)
    assert next(answers).number == 0
    processes = begun(tmp_path, 2)
    answers.close()
    require_gone(processes, 0)


# -- the same on Ray ---------------------------------------------------------------------------

ON_RAY = """
import sys
from pathlib import Path
from evatune.finetune.comparison import grid
from evatune.finetune.recipe_files import load
from tests.finetune.comparison.test_workers import cell
grid._run_in_worker = cell
cells = grid.grid([load("images-fonts")], ["lora"], range(4), [], Path(sys.argv[1]))
grid.run_all(cells, 2, print, "ray")
"""


def test_our_ray_listens_to_this_machine_only_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with parent(ON_RAY, tmp_path) as (process, calls):
        processes = psutil.Process(process.pid).children(recursive=True)
        assert set(calls) <= set(processes)
        addresses = {
            ipaddress.ip_address(place.laddr.ip.removeprefix("::ffff:"))
            for one in (psutil.Process(process.pid), *processes)
            for place in one.net_connections()
            if place.status == psutil.CONN_LISTEN
        }
        assert addresses
        assert all(address.is_loopback for address in addresses)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        require_gone(processes, 10)
    assert out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
