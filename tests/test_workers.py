"""Calls in processes of their own: who answers, who dies, who ends whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from evatune.tasks.workers import run_calls

ROOT = Path(__file__).parent.parent


# -- what the workers call ------------------------------------------------------------------------------


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
    """The first call ends; the others take as good as forever, and do not listen to who asks them to end."""
    if number:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(folder, number, os.getpid())
        time.sleep(600)


# -- answers --------------------------------------------------------------------------------------------


def test_every_call_is_answered_and_a_death_loses_its_own_call_only() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    fates = {2: "killed", 3: "left"}
    answers = list(run_calls(perhaps_die, [(number, fates.get(number)) for number in range(7)], 2))
    assert {answer.number for answer in answers if answer.died} == fates.keys()
    results = {answer.number: answer.result for answer in answers if not answer.died}
    assert {number: result[0] for number, result in results.items()} == {n: n for n in (0, 1, 4, 5, 6)}
    assert len({process for _, process, _ in results.values()} - {os.getpid()}) <= 4  # two, and two in their place
    assert {threads for _, _, threads in results.values()} == {"1"}
    assert os.environ.get("OMP_NUM_THREADS") == before


# -- ends -----------------------------------------------------------------------------------------------


def begun(folder: Path, count: int) -> list[psutil.Process]:
    """The processes of `count` calls, once they are at it."""
    deadline = time.monotonic() + 60
    while len(files := [path for path in folder.iterdir() if path.suffix != ".part"]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [psutil.Process(int(pid)) for path in files for pid in path.read_text().split()]


def require_gone(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


PARENT = """
import sys
from evatune.tasks.workers import run_calls
from tests.test_workers import linger
for answer in run_calls(linger, [(sys.argv[1], number) for number in range(4)], 2):
    print(answer)
"""


def parent_of_two(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A process with two of four calls begun; the workers and their children."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    return parent, begun(folder, 2)


def test_an_interrupt_ends_all_at_once_and_begins_nothing(tmp_path: Path) -> None:
    parent, processes = parent_of_two(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does it
    out, errors = parent.communicate(timeout=15)
    require_gone(processes, 0)
    assert out == ""
    assert errors.count("Traceback") == 1  # the parent's own
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_no_worker_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    parent, processes = parent_of_two(tmp_path)
    parent.kill()
    parent.communicate(timeout=15)
    require_gone(processes, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_a_worker_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    answers = run_calls(stay_or_go, [(str(tmp_path), number) for number in range(3)], 2)
    assert next(answers).number == 0
    processes = begun(tmp_path, 2)
    answers.close()
    require_gone(processes, 0)
