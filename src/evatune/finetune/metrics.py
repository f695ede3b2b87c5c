"""The metrics of a run: one JSON object per line, written while it trains, and read again."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from evatune.modeling.sharding import is_sharded_parameter, whole_shape
from evatune.schemas import FormatError, raise_with_path
from evatune.schemas.run import MetricsLine
from evatune.schemas.text import read_text, validate_json
from evatune.utils.atomic import write_text
from evatune.utils.system import process_status

METRICS = "metrics.jsonl"
_CLEAR, _PEAK = Path("/proc/self/clear_refs"), "5"  # the file that resets, and what, by proc(5)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, in the order of their steps.

    Damaged lines are left out, with a warning for all but the last: a killed run may have written
    half of that one.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    with raise_with_path(path, "remove it; the result of the run stands without"):
        texts = read_text(path, errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(validate_json(MetricsLine, text).model_dump())
        except FormatError as fault:
            if number < len(texts):
                where = f"line {number} of {str(path)!r}"
                warnings.warn(f"{where} is left out: it {fault}", stacklevel=2)
    return lines


class MetricsCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Appends one JSON object per log or evaluation to a file.

    Args:
        path: the file. batch_size: examples per optimizer step.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path = path
        self.batch_size = batch_size
        self.norms: dict[str, float] = {}
        self.first_step = 0
        self.start_time = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed run repeats the steps after its checkpoint; without one it begins anew.
        written = read_metrics(self.path.parent) if state.global_step else []
        valid = [line for line in written if line["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in valid))
        self.first_step = state.global_step
        self.start_time = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        if state.global_step == 0 or (state.global_step + 1) % args.logging_steps == 0:
            self.norms = _gradient_norms(model)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], model: nn.Module, **_: Any
    ) -> None:
        # summaries, of what result.json and the calibration hold
        if "train_runtime" in logs or "evatune/batches" in logs:
            return
        line = {"step": state.global_step, **self._speed(state.global_step)}
        line |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if "loss" in logs:
            clipping = _clipping_factor(logs, args.max_grad_norm)
            line |= {key: norm * clipping for key, norm in self.norms.items()}
            line["peak_memory_bytes"] = peak_memory()
            line["trainable_parameters"] = count_trainable(model)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _speed(self, step: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.start_time
        samples = (step - self.first_step) * self.batch_size
        return {
            "seconds": seconds,
            "samples_per_second": samples / seconds if seconds else 0.0,
        }


def _clipping_factor(logs: dict[str, Any], max_norm: float | None) -> float:
    """Return by how much Trainer's clipping made the gradient smaller.

    The norms of A and B are taken after the clipping; Trainer's own norm tells its factor.
    """
    if not max_norm:
        return 1.0
    return float(max(1.0, logs.get("grad_norm", 0.0) / max_norm))


def _gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of the gradient of all A and of all B; nothing where there are none.

    Of shards there is none either: other processes hold the rest.
    """
    norms: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
    for path, parameter in model.named_parameters():
        if parameter.grad is None or is_sharded_parameter(parameter):
            continue
        for matrix in norms:
            if f"lora_{matrix}" in path:
                norms[matrix].append(parameter.grad.float().norm())
    return {
        f"grad_norm_{matrix}": float(torch.stack(parts).norm())
        for matrix, parts in norms.items()
        if parts
    }


def count_trainable(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)


def peak_memory() -> int:
    """Return the peak in bytes since `reset_peak_memory`: of CUDA's allocator, else of the process.

    Where a process cannot forget its peak (not on Linux), since it started.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    highest = process_status("VmHWM")
    if highest is not None:
        return int(highest.removesuffix(" kB")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Begin a new peak: a process may have done other runs before, with larger ones."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _CLEAR.write_text(_PEAK)
