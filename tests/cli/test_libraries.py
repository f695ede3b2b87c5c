"""What libraries print does not mix with results."""

from __future__ import annotations

import subprocess
import sys

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
