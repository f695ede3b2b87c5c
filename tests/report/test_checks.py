"""What is said of a recipe before it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evatune.finetune.check import Check, Memory, Need, Plan, Size, Time
from evatune.finetune.recipe_files import load
from evatune.report.checks import facts, show
from tests.helpers import wide_terminal

SIZE = Size(
    parameters=1000,
    trained=10,
    products=900,
    quantizable=900,
    widths=90,
    widest=9,
    kept=9,
    vocabulary=0,
    calibrated=(),
)
MEMORY = Memory(4 * 2**30, 2**20, 3 * 2**29, 100.0, 0.0, 8 * 2**30)
FOUND = Check(
    recipe=load("paper-metamath"),
    plan=Plan(
        [
            Need("model", "google/[b]gemma", "to download", 12, 18_500_000_000),
            Need("data", "openai/gsm8k", "to download", 1, None),
            Need("data", "other/set", "unknown"),
        ],
        True,
    ),
    size=SIZE,
    memory=MEMORY,
    time=Time(2.4e13, 1e12),
    trial=None,
    missing=["google/[b]gemma", "openai/gsm8k"],
)


def shown(**changes: Any) -> str:
    terminal = wide_terminal()
    show(terminal, replace(FOUND, **changes), ["evatune", "train", "x"])
    return str(terminal.file.getvalue())  # type: ignore[attr-defined]


def test_sizes_costs_and_what_was_not_tried_are_said() -> None:
    text = shown()
    for part in (
        "google/[b]gemma",
        "to download: 12 files, 18.5 GB",
        "to download: 1 file ",
        "Parameters: 1,000, of which 10 are trained (1.0%).",
        "about 5.5 GiB at the peak, of the 8.0 GiB",
        "(weights 4.0 GiB, gradients and optimizer 1 MiB, a batch 1.5 GiB)",
        "Time: about 60 s on this machine, without the answers that the tests ask for",
        "Not tried: no run from end to end, for want of google/[b]gemma, openai/gsm8k.",
    ):
        assert part in text
    assert "Ready" not in text
    assert "once the hub" not in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"memory": replace(MEMORY, device=2**30)}, "more than there is: lower training.batch"),
        ({"size": None}, "unknown, for want of the model's configuration"),
        ({"memory": None}, "Memory and time: unknown for this architecture"),
        ({"plan": Plan([], False)}, "and tries it, once the hub can be reached."),
    ],
)
def test_what_is_not_known_or_too_much_is_said(changes: dict[str, Any], part: str) -> None:
    assert part in shown(**changes)


def test_machines_get_the_same() -> None:
    found = facts(FOUND)
    assert found["needs"][0]["size"] == 18_500_000_000
    assert found["memory_bytes"]["peak"] == MEMORY.peak
    assert found["time"]["seconds"] == 60
    assert (found["ready"], found["trial"]) == (False, None)
    assert facts(replace(FOUND, size=None, memory=None, time=None))["parameters"] is None
