"""Pages of the tuned comparison in docs/results, from the committed lines of its runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from evatune.finetune.comparison.run_lines import read_lines
from evatune.finetune.comparison.tuned_summary import summarize
from evatune.report.tuned_markdown import write_pages

_ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=Path, default=_ROOT / "benchmarks/results/comparison")
    parser.add_argument("--output", type=Path, default=_ROOT / "docs/results")
    arguments = parser.parse_args()
    lines = read_lines(sorted(arguments.lines.glob("*.jsonl")))
    for path in write_pages(summarize(lines), arguments.output, "make results"):
        print(path)


if __name__ == "__main__":
    main()
