"""A folder is for one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evatune.errors import ConfigError
from evatune.utils.lock import held

torch.set_num_threads(1)


def test_a_folder_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    code = f"""if True:
        import time
        from pathlib import Path
        from evatune.utils.lock import held
        with held(Path({str(tmp_path / "run")!r})):
            print("held", flush=True)
            time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use"), held(tmp_path / "run"):
            pass
        holder.kill()
    with held(tmp_path / "run"):
        (tmp_path / "run" / "result").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]
