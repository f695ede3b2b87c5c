"""The eight sets of questions as lm-evaluation-harness reads a data set; see tasks/."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from evatune.finetune.recipe import HUB, DataOptions
from evatune.finetune.tasks.generation.hub_sets import read_rows
from evatune.finetune.tasks.generation.question_sets import SETS
from evatune.utils.extras import extras

with extras(__name__):
    import datasets


def read_questions(name: str, evatune_source: str = HUB, **_: Any) -> dict[str, Any]:
    """Return the questions that a set is tested on, with the columns prompt, answer and choices.

    Args:
        evatune_source: "hub", or a folder with copies, see `read_rows`.

    Raises DataError for a set that cannot be had.
    """
    question_set = SETS[name]
    pairs = read_rows(
        DataOptions(source=evatune_source),
        question_set.source,
        question_set.subset,
        question_set.tested_on,
        question_set.pair,
    )
    return {"test": datasets.Dataset.from_list([asdict(pair) for pair in pairs])}
