"""Programs that a model may write, and how each ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evatune.errors import ProcessError
from evatune.finetune.evaluation import limited
from evatune.finetune.evaluation.programs import ENDED_EARLY, OUT_OF_TIME, PASSED, Limits, outcome

SMALL = Limits(seconds=30, memory=256 << 20)


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("import math, re, typing\nassert math.sqrt(4) == 2", PASSED),
        ("assert 1 == 2", "AssertionError"),
        ("def (", "SyntaxError"),
        ("\0", "SyntaxError"),
        ("while True: pass", OUT_OF_TIME),
        ("while True: print('a' * 1000)", OUT_OF_TIME),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", ENDED_EARLY),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.system('true')", "PermissionError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
        ("input()", "EOFError"),
        (
            # what tells how it ended is written over
            "import os\nfor i in range(3, 99):\n try: os.write(i, b'- ' * 999)\n except OSError: 0",
            ENDED_EARLY,
        ),
    ],
)
def test_a_program_passes_only_if_it_comes_to_its_end(program: str, end: str) -> None:
    # Little time for what has no end alone, so that a busy machine makes nothing of the rest late.
    limits = replace(SMALL, seconds=1) if end == OUT_OF_TIME else SMALL
    assert outcome(program, limits) == end


def test_a_program_writes_no_file_and_removes_none(tmp_path: Path) -> None:
    file = tmp_path / "there"
    file.touch()
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os; os.remove({str(file)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert outcome(program, SMALL) == "PermissionError"
    assert list(tmp_path.iterdir()) == [file]


def test_a_program_that_cannot_be_limited_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "limited.py"
    broken.write_text("raise ValueError('no limits here')")
    monkeypatch.setattr(limited, "__file__", str(broken))
    with pytest.raises(ProcessError, match="cannot be limited on this machine"):
        outcome("pass", SMALL)
