"""Calls in processes of their own: who answers, who dies, who ends whom."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from evatune.finetune.comparison.workers import run_calls
from tests.finetune.comparison.calls import begun, parent, require_gone, say

# -- what the workers call ---------------------------------------------------------------------


def perhaps_die(number: int, fate: str | None = None) -> tuple[int, int, str]:
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "left":
        os._exit(0)
    return number, os.getpid(), os.environ["OMP_NUM_THREADS"]


def stay_or_go(folder: str, number: int) -> None:
    """End the first call; take as good as forever over the others, deaf to who asks for an end."""
    if number:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(folder, number, os.getpid())
        time.sleep(600)


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


OURS = """
import sys
from evatune.finetune.comparison.workers import run_calls
from tests.finetune.comparison.calls import linger
for answer in run_calls(linger, [(sys.argv[1], number) for number in range(4)], 2):
    print(answer)
"""


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
