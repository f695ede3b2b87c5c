"""What libraries print does not mix with results."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from evatune.cli.libraries import progress_on_stderr

_NOISE = """
import subprocess
from evatune.cli.libraries import libraries_on_stderr
with libraries_on_stderr():
    print("a library")
    subprocess.run(["echo", "a worker"])
print("result")
"""


def test_what_libraries_print_does_not_mix_with_results() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NOISE], capture_output=True, text=True, check=True
    )
    assert done.stdout == "result\n"
    assert {"a library", "a worker"} <= set(done.stderr.splitlines())


def test_lines_of_a_long_run_go_to_stderr_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("evatune")
    for quiet in (False, True):
        with progress_on_stderr(quiet):
            logger.info("half of it")
        logger.info("nobody asked")
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", "" if quiet else "half of it\n")
    assert not logger.handlers
