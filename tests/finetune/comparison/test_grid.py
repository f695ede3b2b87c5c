"""Comparisons: what is done is kept, one failing run does not end the others."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from evatune.errors import ConfigError, MissingExtraError
from evatune.finetune.comparison.grid import grid, run_all
from evatune.finetune.comparison.summary import summarize
from evatune.finetune.metrics import METRICS
from evatune.finetune.run import run
from evatune.finetune.run_folder import RESULT
from tests.finetune.helpers import SMALL, command_line, small
from tests.processes import FORKS

torch.set_num_threads(1)


def test_a_comparison_keeps_what_is_done_and_goes_on_past_what_fails(
    bert_folder: Path, tmp_path: Path
) -> None:
    recipe = small(bert_folder, "training.steps=4")
    failing, *runs = grid([recipe], ["head", "eva"], [2, 0, 1], [1e-2], tmp_path)
    runs = [run_ for run_ in runs if run_.recipe.seed != 2]
    assert len(runs) == 4
    failing.folder.mkdir(parents=True)
    (failing.folder / "foreign").write_text("")
    run(runs[0].recipe, runs[0].folder, quiet=True)
    before = (runs[0].folder / RESULT).stat().st_mtime_ns
    told: dict[Path, str | None] = {}
    failed = run_all([failing, *runs], 1, lambda done, problem: told.update({done.folder: problem}))
    assert list(failed) == [failing.folder]
    assert "holds no run of evatune" in failed[failing.folder]
    assert told == failed | {run_.folder: None for run_ in runs}
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


def test_an_interrupted_comparison_stops_at_once_and_goes_on(
    bert_folder: Path, tmp_path: Path
) -> None:
    import psutil

    out = tmp_path / "c"
    settings = [*SMALL, f"model={bert_folder}", "training.steps=10000"]
    plan = ["--methods", "lora", "--seeds", "0,1,2", "--workers", "1", "--out", str(out)]
    arguments = (str(tmp_path), "compare", "understanding-bbc", *settings, *plan)
    process = FORKS.Process(target=command_line, args=arguments)
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("cells/*/metrics.jsonl")) and time.monotonic() < deadline:
            assert process.exitcode is None
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=20)
    finally:
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
    assert process.exitcode == 130
    assert (tmp_path / "printed").read_text() == ""
    errors = (tmp_path / "errors").read_text()
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
    with pytest.raises(MissingExtraError, match=r"pip install 'evatune\[ray\]'"):
        run_all(runs, 1, lambda *_: None, "ray")
