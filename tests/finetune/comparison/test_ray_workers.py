"""Runs as tasks of Ray."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from evatune.finetune.comparison.grid import Run, grid
from evatune.finetune.comparison.summary import summarize
from evatune.finetune.run import run
from tests.finetune.comparison.calls import QUICK, parent, require_gone, told_by_calls
from tests.finetune.helpers import small

torch.set_num_threads(1)


def cells(bert_folder: Path, folder: Path) -> list[Run]:
    recipe = small(bert_folder, "training.steps=2", "training.eval_every=2")
    return grid([recipe], ["head"], range(QUICK + 3), [], folder / "cells")


ON_RAY = """
import json
import sys
from pathlib import Path
from evatune.finetune.comparison import grid
from tests.finetune.comparison.calls import run_or_linger
from tests.finetune.comparison.test_ray_workers import cells

def tell(run, problem):
    print(json.dumps([str(run.folder), problem]), flush=True)

runs = cells(Path(sys.argv[2]), Path(sys.argv[1]))
grid._run_in_worker = run_or_linger
grid.run_all(runs, 2, tell, "ray")
"""


def test_our_ray_runs_the_same_cells_on_this_machine_only_and_ends_with_an_interrupt(
    bert_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    runs = cells(bert_folder, tmp_path)
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "foreign").write_text("")
    with parent(ON_RAY, tmp_path, str(bert_folder)) as (process, calls):
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
    assert {path.name for path in told_by_calls(tmp_path)} == {"2", "3"}
    told = dict(json.loads(line) for line in out.splitlines())
    assert sorted(told) == sorted(str(run_.folder) for run_ in runs[:QUICK])
    assert runs[0].done
    assert told[str(runs[0].folder)] is None
    assert "holds no run of evatune" in told[str(runs[1].folder)]
    again = run(runs[0].recipe, tmp_path / "here", quiet=True)
    assert summarize(runs).lines[0].eval_loss.mean == pytest.approx(again["eval_loss"], abs=1e-6)
