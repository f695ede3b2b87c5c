"""A folder for one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evatune.errors import ConfigError
from evatune.utils.lock import held


def test_a_folder_into_which_nothing_was_put_is_gone_again() -> None:
    with held(Path("deep/run")):
        assert Path("deep/run").is_dir()
    assert not Path("deep/run").exists()


def test_what_was_put_into_the_folder_stays_and_the_lock_goes() -> None:
    with held(Path("run")):
        Path("run/metrics").write_text("1")
    assert os.listdir("run") == ["metrics"]


def test_a_second_process_is_refused_at_once_and_let_in_afterwards() -> None:
    code = (
        "from pathlib import Path; from evatune.utils.lock import held\n"
        "with held(Path('run')): print('in')"
    )
    run = [sys.executable, "-c", code]
    with held(Path("run")):
        refused = subprocess.run(run, capture_output=True, text=True)
    assert "in use by another evatune" in refused.stderr
    assert refused.returncode == 1
    assert subprocess.run(run, capture_output=True, text=True).stdout == "in\n"


def test_a_folder_that_cannot_be_made_is_named() -> None:
    Path("file").write_text("")
    with pytest.raises(ConfigError, match="'file/run' cannot be written"), held(Path("file/run")):
        pass
