"""Two methods of a tuned comparison against each other."""

from __future__ import annotations

from types import ModuleType

from evatune.finetune.comparison.tuned_summary import summarize
from tests.tuned_lines import tuned_lines


def test_a_planted_difference_is_printed_by_domain_and_over_all(paired: ModuleType) -> None:
    methods = ("lora", "lora-ga", "eva")
    lines = tuned_lines(("images", "rl"), ("digits", "fonts"), methods)
    printed = paired.paired_lines(summarize(lines).groups, "eva", "lora-ga")
    names = [(line.split()[0], line.split()[1]) for line in printed]
    assert names == [
        (name, kind) for name in ("images", "rl", "all") for kind in ("score", "sooner")
    ]
    for line in printed:
        assert 0 < float(line.split()[2]) < 10
    assert "4 tasks" in printed[-1]


def test_planted_choices_are_counted(paired: ModuleType) -> None:
    lines = tuned_lines(methods=("lora", "lora-fa"), tasks=("digits", "fonts"))
    tuned, once, *_, at_end = paired.choice_lines(summarize(lines).groups, "lora-fa", "lora")
    assert tuned.endswith("right on 2 of 2 tasks")
    assert once.startswith("one run of each at lora's best rate")
    assert at_end == "mean curves of test seeds at 100% of the steps: right on 2 of 2 tasks"
