"""Two methods of the tuned comparison against each other, from the lines of its runs.

    python benchmarks/paired.py eva-paper-centered eva-paper-random
    python benchmarks/paired.py eva-paper-centered lora --choices
    python benchmarks/paired.py eva-paper-centered lora --lines benchmarks/results/fresh-seed

docs/results hold every method against LoRA. This prints, for any other reference, the differences
of test scores, of the share of a run by which both are before LoRA, and of validation scores over
all rates that both searches share with LoRA's, in hundredths with 95 % intervals. With `--choices`
it prints on how many tasks less than a whole search would have preferred the method that has the
better test score. `fresh-seed` holds a second search of both methods by another seed, run after the
first had shown what to expect at rates that nobody chose.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evatune.finetune.comparison.run_lines import read_lines
from evatune.finetune.comparison.tuned_cells import Cell, Group
from evatune.finetune.comparison.tuned_summary import summarize
from evatune.report.evidence import all_tasks, compared, interval_text, signed

_RESULTS = Path(__file__).resolve().parent / "results"
_MEASURES = (
    ("score", Group.test_scores),
    ("sooner", Group.steps_saved),
    ("rates", Group.gained_over_rates),
)
_SHARES = (0.1, 0.3, 0.5, 0.75, 1.0)  # of the steps of a run


def paired_lines(groups: Sequence[Group], method: str, reference: str) -> list[str]:
    """Return the differences by domain, and over all tasks that have both."""
    lines = []
    for name, some in [*((group.domain, [group]) for group in groups), ("all", groups)]:
        for measure, of in _MEASURES:
            both = {
                task: {one: by_method[one] for one in (method, reference)}
                for task, by_method in all_tasks(some, of).items()
                if {method, reference} <= by_method.keys()
            }
            found = compared(both, reference)
            for line in found.methods if found else ():
                by_task = f"{line.wins} won, {line.ties} tied, {line.losses} lost"
                lines.append(
                    f"{name:14} {measure:6} {signed(line.mean):>6}{interval_text(line.fixed_tasks)}"
                    f"  tasks like these{interval_text(line.random_tasks)}  {len(both)} tasks"
                    f"{f': {by_task}' if line.fixed_tasks else ', one seed'}"
                )
    return lines


def choice_lines(groups: Sequence[Group], method: str, reference: str) -> list[str]:
    """Return on how many tasks validation prefers the one with the higher test score."""
    pairs = [
        (cell, other)
        for group in groups
        for cell in group.of(method)
        if (other := group.cell(cell.task, reference)) is not None and cell.scores and other.scores
    ]
    better = [(cell.score or 0) > (other.score or 0) for cell, other in pairs]

    def told(by: str, preferred: list[bool]) -> str:
        right = sum(one == truth for one, truth in zip(preferred, better, strict=True))
        return f"{by}: right on {right} of {len(pairs)} tasks"

    lines = [
        told(
            "tuning seeds, each at its own best rate",
            [cell.validation_loss < other.validation_loss for cell, other in pairs],
        ),
        f"one run of each at {reference}'s best rate of that seed:"
        f" {', '.join(_right_at_once(pairs))} tasks, by tuning seed",
    ]
    lines += [
        told(
            f"mean curves of test seeds at {share:.0%} of the steps",
            [_loss_at(cell, share) < _loss_at(other, share) for cell, other in pairs],
        )
        for share in _SHARES
    ]
    return lines


def _right_at_once(pairs: Sequence[tuple[Cell, Cell]]) -> list[str]:
    """Return, for each tuning seed, on how many tasks its runs prefer the better one.

    Of all with the other's best rate of that seed; after the first seed some have other rates.
    """
    texts = []
    for seed in sorted({seed for cell, _ in pairs for seed in cell.tuning_losses}):
        right = []
        for cell, other in pairs:
            known = [point for point in other.rates if seed in point.losses]
            best = min(known, key=lambda point: point.losses[seed])
            mine = next((point.losses for point in cell.rates if point.rate == best.rate), {})
            if seed in mine:
                prefers = mine[seed] < best.losses[seed]
                right.append(prefers == ((cell.score or 0) > (other.score or 0)))
        texts.append(f"right on {sum(right)} of {len(right)}")
    return texts


def _loss_at(cell: Cell, share: float) -> float:
    return min(cell.curve, key=lambda point: abs(point[0] - share * cell.steps))[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", help="as the pages call it, such as 'loraplus (ratio 64)'")
    parser.add_argument("reference")
    parser.add_argument("--lines", type=Path, nargs="+", default=[_RESULTS / "comparison"])
    parser.add_argument("--choices", action="store_true")
    arguments = parser.parse_args()
    paths = [path for folder in arguments.lines for path in sorted(folder.glob("*.jsonl"))]
    summary = summarize(read_lines(paths))
    groups = [group for group in summary.groups if not group.condition]
    for name in (arguments.method, arguments.reference):
        if name not in summary.methods:
            parser.error(f"no line is of {name!r}; choose two of {', '.join(summary.methods)}")
    lines = paired_lines(groups, arguments.method, arguments.reference)
    if arguments.choices:
        lines += choice_lines(groups, arguments.method, arguments.reference)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
