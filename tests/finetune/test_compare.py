"""Comparisons: what is done is kept, one failing run does not end the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evatune.errors import ConfigError
from evatune.finetune.compare import grid, run_all
from evatune.finetune.metrics import METRICS
from evatune.finetune.run import run
from evatune.finetune.run_folder import RESULT
from evatune.finetune.summary import summarize
from tests.finetune.helpers import SMALL, small

torch.set_num_threads(1)


def test_a_comparison_keeps_what_is_done_and_goes_on(bert_folder: Path, tmp_path: Path) -> None:
    recipe = small(bert_folder, "training.steps=4")
    runs = grid([recipe], ["head", "eva"], [0, 1], [1e-2], tmp_path)
    assert len(runs) == 4
    run(runs[0].recipe, runs[0].folder, quiet=True)
    before = (runs[0].folder / RESULT).stat().st_mtime_ns
    told: list[Any] = []
    assert run_all(runs, 2, lambda done, problem: told.append((done.folder.name, problem))) == {}
    assert len(told) == 4
    assert (runs[0].folder / RESULT).stat().st_mtime_ns == before
    found = summarize(runs)
    assert {line.method: line.seeds for line in found.lines} == {"head": 2, "eva": 2}
    heads = [
        json.loads((run_.folder / RESULT).read_text())["eval_loss"]
        for run_ in runs
        if run_.recipe.method == "head"
    ]
    assert found.targets == {"bbc": max(heads)}
    assert next(line.steps_to_target for line in found.lines if line.method == "head") is not None
    assert all(line.score.deviation is not None and line.best for line in found.lines)
    assert found.averages().keys() == {"head", "eva"}


def test_a_failing_cell_does_not_end_the_others(bert_folder: Path, tmp_path: Path) -> None:
    recipe = small(bert_folder, "training.steps=4")
    runs = grid([recipe], ["head"], [0, 1], [], tmp_path)
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "foreign").write_text("")
    failed = run_all(runs, 2, lambda *_: None)
    assert list(failed) == [runs[0].folder]
    assert "holds no run of evatune" in failed[runs[0].folder]
    assert runs[1].done


def test_an_interrupted_comparison_stops_at_once_and_goes_on(
    bert_folder: Path, tmp_path: Path
) -> None:
    import psutil

    out = tmp_path / "c"
    settings = [
        *SMALL,
        f"model={bert_folder}",
        "training.steps=10000",
        "--methods",
        "lora",
        "--seeds",
        "0,1,2",
    ]
    command = [
        sys.executable,
        "-m",
        "evatune",
        "compare",
        "understanding-bbc",
        *settings,
        "--workers",
        "1",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=20)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
    assert process.returncode == 130
    assert printed == ""
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("evatune: interrupted; train and compare go on")
    (run_,) = (out / "cells").iterdir()  # the other two have not begun
    assert (run_ / METRICS).exists()
    assert not (out / ".evatune.lock").exists()


def test_executors_are_named_and_ray_names_its_extra(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = grid([small(bert_folder)], ["head"], [0], [], tmp_path)
    with pytest.raises(ConfigError, match="executor is 'slurm'; choose one of process, ray"):
        run_all(runs, 1, lambda *_: None, "slurm")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'evatune\[ray\]'"):
        run_all(runs, 1, lambda *_: None, "ray")
