"""Ctrl-C: one line and status 130, whenever it comes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.conftest import Command


def test_an_interrupt_while_calibrating_leaves_nothing(
    init: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.BertModel, "forward", interrupt)
    answer = init()
    assert answer.status == 130
    assert answer.err.startswith("evatune: interrupted; ")
    assert answer.err.endswith("another command has written nothing\n")
    assert list(work.iterdir()) == []


_INTERRUPTED_WHEN_LOADING = """
import os, signal, sys
library = sys.argv.pop()
class Finder:
    def find_spec(self, name, *_):
        if name == library:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from evatune.cli import main
main()
"""


def test_an_interrupt_while_libraries_load_is_one_line(work: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _INTERRUPTED_WHEN_LOADING, "init", library],
            stderr=subprocess.PIPE,
            text=True,
        )
        for library in ("typer", "torch.nn")
    ]
    for process in running:
        said = process.communicate()[1]
        assert process.returncode == 130, said
        assert re.fullmatch(r"evatune: interrupted; [^\n]+\n", said), said
    assert list(work.iterdir()) == []


def test_an_interrupt_that_is_ignored_stays_ignored(command: Command) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert command("recipes", "ls").status == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
