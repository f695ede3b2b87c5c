"""Runs as tasks of Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evatune.finetune.comparison.grid import grid, run_all
from evatune.finetune.comparison.summary import summarize
from evatune.finetune.run import run
from tests.finetune.helpers import small

torch.set_num_threads(1)


def test_ray_runs_the_same_cells(bert_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    recipe = small(bert_folder, "training.steps=2", "training.eval_every=2")
    runs = grid([recipe], ["head"], [0, 1], [], tmp_path)
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "foreign").write_text("")
    told: list[Path] = []
    failed = run_all(runs, 1, lambda run_, _: told.append(run_.folder), "ray")
    assert sorted(told) == sorted(run_.folder for run_ in runs)
    assert runs[0].done
    assert "holds no run of evatune" in failed[runs[1].folder]
    again = run(runs[0].recipe, tmp_path / "here", quiet=True)
    assert summarize(runs).lines[0].eval_loss.mean == pytest.approx(again["eval_loss"], abs=1e-6)
