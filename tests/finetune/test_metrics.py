"""Metrics: lines that are written while a run trains, and read again."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evatune.finetune.metrics import (
    METRICS,
    MetricsCallback,
    count_trainable,
    peak_memory,
    read_metrics,
    reset_peak_memory,
)

torch.set_num_threads(1)


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step)


def test_a_damaged_line_is_left_out_with_a_warning_and_the_last_one_without(
    tmp_path: Path,
) -> None:
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 3)]
    (tmp_path / METRICS).write_text("\n".join([good[0], '{"step": ', good[1], '{"st']))
    with pytest.warns(UserWarning, match="line 2 of .* is left out"):
        lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / METRICS).write_text("\n".join([*good, '{"st']))
        assert len(read_metrics(tmp_path)) == 2


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("\n".join(lines) + "\n")
    callback = MetricsCallback(tmp_path / METRICS, batch_size=1)
    callback.on_train_begin(None, state(2), None)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    callback.on_train_begin(None, state(0), None)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (4.0, 2.0)])
def test_gradient_norms_are_those_before_clipping(
    norm: float, factor: float, tmp_path: Path
) -> None:
    model = nn.Module()
    model.lora_A = nn.Linear(2, 2, bias=False)
    model.lora_B = nn.Linear(2, 2, bias=False)
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    model.lora_A.weight.grad = torch.full((2, 2), 1.0)
    model.lora_B.weight.grad = torch.full((2, 2), 2.0)
    arguments = SimpleNamespace(logging_steps=1, max_grad_norm=2.0)
    callback = MetricsCallback(tmp_path / METRICS, batch_size=4)
    callback.on_train_begin(arguments, state(0), None)
    callback.on_pre_optimizer_step(arguments, state(0), None, model)
    callback.on_log(arguments, state(1), None, {"loss": 1.0, "grad_norm": norm}, model)
    (line,) = read_metrics(tmp_path)
    assert line["grad_norm_A"] == pytest.approx(2 * factor)
    assert line["grad_norm_B"] == pytest.approx(4 * factor)
    assert line["trainable_parameters"] == count_trainable(model) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="no other system forgets a process's peak")
def test_a_runs_peak_of_memory_is_not_that_of_the_run_before() -> None:
    size = 2**28
    reset_peak_memory()
    before = peak_memory()
    block = torch.ones(size, dtype=torch.uint8)
    assert peak_memory() >= before + size // 2
    del block
    reset_peak_memory()
    assert peak_memory() < before + size // 2
