"""Texts of the check of a recipe before it runs, for the terminal and for machines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from evatune.finetune.check import Check, Memory, Need
from evatune.finetune.check.cost import UTILIZATION
from evatune.report.tables import fitted_table, say
from evatune.report.text import percent
from evatune.utils.extras import extras
from evatune.utils.text import duration, shortened, size

with extras(__name__):
    from rich.console import Console

_HEADINGS = ("what", "source", "status")
_MIB, _GIB = 2**20, 2**30
_UNCOUNTED = {  # domain or task → what the estimate of time leaves out
    "rl": "episodes in the simulator",
    "commonsense-hub": "the eight tests",
    "mathematics-hub": "the answers that the tests ask for",
}


def show(terminal: Console, check: Check, command: Sequence[str]) -> None:
    """Print what a recipe reads, what it costs, and what its trial has shown.

    Args:
        command: that runs it.
    """
    rows = [(need.what, need.source, _state(need)) for need in check.plan.needs]
    if not check.plan.data:
        rows.append(("data", "comes with evatune, or is made", "at hand"))
    terminal.print(fitted_table(terminal, "What it reads", _HEADINGS, rows))
    say(terminal, *_lines(check))
    if check.trial is not None:
        say(terminal, f"Ready: {shlex.join(command)}")


def facts(check: Check) -> dict[str, Any]:
    """Return the same for `--json`."""
    memory, seconds, trial = check.memory, check.time, check.trial
    return {
        "ready": trial is not None,
        "needs": [asdict(need) for need in check.plan.needs],
        "hub_reachable": check.plan.reachable,
        "parameters": check.size and check.size.parameters,
        "trained": check.size and check.size.trained,
        "memory_bytes": memory and asdict(memory) | {"peak": memory.peak},
        "time": seconds and asdict(seconds) | {"seconds": seconds.seconds},
        "missing": check.missing,
        "trial": trial
        and {
            "stand_in": trial.stand_in,
            "seconds": trial.seconds,
            "about": trial.task.about,
            "score_name": trial.result["score_name"],
            "difference": trial.difference,
        },
    }


def _state(need: Need) -> str:
    if need.state == "unknown":
        return "not at hand; its size is unknown, since the hub does not answer"
    if need.state == "at hand":
        return need.state
    files = "1 file" if need.files == 1 else f"{need.files} files"
    return f"to download: {files}" + (f", {size(need.size)}" if need.size is not None else "")


def _lines(check: Check) -> Iterator[str]:
    yield from _costs(check)
    if check.trial is not None:
        yield from _tried(check)
        return
    hub = ", once the hub can be reached" if check.plan.reachable is False else ""
    yield (
        f"Not tried: no run from end to end, for want of {shortened(check.missing)}. --download"
        " fetches the data and what prepares the model's inputs, not its weights, and tries it"
        f"{hub}."
    )


def _costs(check: Check) -> Iterator[str]:
    if check.size is None:
        yield "Parameters, memory and time: unknown, for want of the model's configuration."
        return
    total, trained = check.size.parameters, check.size.trained
    yield f"Parameters: {total:,}, of which {trained:,} are trained ({percent(trained / total)})."
    if check.memory is None or check.time is None:
        yield "Memory and time: unknown for this architecture."
        return
    yield from _memory_lines(check.memory)
    recipe = check.recipe
    uncounted = _UNCOUNTED.get(recipe.task) or _UNCOUNTED.get(recipe.domain)
    left_out = f", without {uncounted}" if uncounted else ""
    yield (
        f"Time: about {duration(check.time.seconds)} on this machine{left_out}. That is rough, to a"
        f" factor of two: {check.time.operations:.1e} operations, at {UTILIZATION:.0%} of the"
        f" {check.time.rate:.1e} a second that a product of large matrices has here."
    )


def _memory_lines(memory: Memory) -> Iterator[str]:
    parts = {
        "weights": memory.weights,
        "gradients and optimizer": memory.training,
        "a batch": memory.activations,
        "a batch of evaluation": memory.evaluation,
        "calibration": memory.calibration,
    }
    large = {name: count for name, count in parts.items() if count >= _MIB}
    listed = ", ".join(f"{name} {_binary(count)}" for name, count in large.items())
    yield (
        f"Memory: tensors take about {_binary(memory.peak)} at the peak, of the"
        f" {_binary(memory.device)} that this machine has ({listed})."
    )
    if memory.peak > memory.device:
        yield (
            "That is more than there is: lower training.batch_size and raise training.accumulate as"
            " many times, or lower data.max_length."
        )


def _tried(check: Check) -> Iterator[str]:
    trial = check.trial
    assert trial is not None
    if trial.task.about:
        yield f"Data: {trial.task.about}."
    model = "the model itself"
    if trial.stand_in:
        model = f"a small stand-in of {check.recipe.model}, with random weights"
    steps = "data, two steps of training and the evaluation work"
    if trial.difference is not None:
        steps = f"{steps}, and what was saved gives the same outputs when it is read again"
    yield f"Tried in {duration(trial.seconds)} with {model}: {steps}."


def _binary(count: float) -> str:
    """Return a number of bytes for people, as devices are sold: "90 MiB", "1.5 GiB"."""
    return f"{count / _MIB:,.0f} MiB" if count < _GIB else f"{count / _GIB:,.1f} GiB"
