"""A folder is for one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evatune.errors import ConfigError
from evatune.utils.lock import lock_folder

torch.set_num_threads(1)


def test_a_folder_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    code = f"""if True:
        import time
        from pathlib import Path
        from evatune.utils.lock import lock_folder
        with lock_folder(Path({str(tmp_path / "run")!r})):
            print("held", flush=True)
            time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use"), lock_folder(tmp_path / "run"):
            pass
        holder.kill()
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "result").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_a_folder_into_which_nothing_was_put_is_gone_again() -> None:
    with lock_folder(Path("deep/run")):
        assert Path("deep/run").is_dir()
    assert not Path("deep/run").exists()


def test_what_was_put_into_the_folder_stays_and_the_lock_goes() -> None:
    with lock_folder(Path("run")):
        Path("run/metrics").write_text("1")
    assert os.listdir("run") == ["metrics"]


def test_a_second_process_is_refused_at_once_and_let_in_afterwards() -> None:
    code = (
        "from pathlib import Path; from evatune.utils.lock import lock_folder\n"
        "with lock_folder(Path('run')): print('in')"
    )
    run = [sys.executable, "-c", code]
    with lock_folder(Path("run")):
        refused = subprocess.run(run, capture_output=True, text=True)
    assert "in use by another evatune" in refused.stderr
    assert refused.returncode == 1
    assert subprocess.run(run, capture_output=True, text=True).stdout == "in\n"


def test_a_folder_that_cannot_be_made_is_named() -> None:
    Path("file").write_text("")
    with (
        pytest.raises(ConfigError, match="'file/run' cannot be written"),
        lock_folder(Path("file/run")),
    ):
        pass
