"""The folder of a run: whose it is, and what stays in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evatune.errors import BudgetError, ConfigError
from evatune.finetune.metrics import METRICS, read_metrics
from evatune.finetune.run import run
from evatune.finetune.run_folder import RECIPE, RESULT
from tests.finetune.helpers import evaluations, small

torch.set_num_threads(1)


def test_a_finished_run_is_read_and_not_run_again(bert_folder: Path, tmp_path: Path) -> None:
    first = run(small(bert_folder), tmp_path / "run", quiet=True)
    written = (tmp_path / "run" / RESULT).stat().st_mtime_ns
    assert run(small(bert_folder), tmp_path / "run", quiet=True) == first
    assert (tmp_path / "run" / RESULT).stat().st_mtime_ns == written


def test_a_folder_with_another_run_is_left_alone(bert_folder: Path, tmp_path: Path) -> None:
    run(small(bert_folder, "method=head"), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="method is 'head' there, not 'lora'; name another"):
        run(small(bert_folder, "method=lora"), tmp_path / "run", quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds no run of evatune"):
        run(small(bert_folder), tmp_path / "mine", quiet=True)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    bert_folder: Path,
    tmp_path: Path,
) -> None:
    recipe = small(bert_folder)
    run(recipe, tmp_path / "whole", quiet=True)
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(tmp_path / "whole" / RECIPE, killed)
    lines = (tmp_path / "whole" / METRICS).read_text().splitlines(keepends=True)
    (killed / METRICS).write_text("".join(lines[:2]))
    run(recipe, killed, quiet=True)
    assert len(read_metrics(killed)) == len(lines)
    assert evaluations(killed) == evaluations(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["method=eva-rho1"], BudgetError),  # the pooler has one direction, see NARROW_TARGETS
        (["training.report_to=[nothing]"], ConfigError),
        (["method=pissa"], KeyboardInterrupt),
    ],
)
def test_a_run_that_ends_before_it_trains_leaves_the_folder_free(
    settings: list[str],
    error: type[BaseException],
    bert_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if error is KeyboardInterrupt:  # when the method has changed the weights, and written how
        monkeypatch.setattr(transformers.Trainer, "train", interrupted)
    with pytest.raises(error):
        run(small(bert_folder, *settings), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
