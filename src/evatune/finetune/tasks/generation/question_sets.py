"""Eight sets of questions with choices, learned together and each tested: commonsense reasoning.

Their splits to train on are 147,580 questions. Each set is tested on the split whose answers are
known, by the choice that is the most likely as a whole; the score is the mean over the sets. The
wording of the prompts is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evatune.finetune.recipe import DataOptions
from evatune.finetune.tasks.generation.base import Pair
from evatune.finetune.tasks.generation.hub_sets import HubSets, drawn_sets, read_rows

TASK = "commonsense-hub"
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class QuestionSet:
    """A data set of the hub.

    Attributes:
        pair: a row → prompt, answer and choices.
        tested_on: the split to be tested on.
    """

    source: str
    subset: str | None
    pair: Callable[[_Row], Pair]
    tested_on: str = "validation"


def _asked(question: str, choices: list[str], right: int) -> Pair:
    """Return the question with its choices listed, one below the other.

    Raises ValueError for a right one that is none, as where answers are kept secret.
    """
    if not 0 <= right < len(choices):
        raise ValueError(f"no choice has the number {right}")
    listed = "\n".join(f"- {choice}" for choice in choices)
    return Pair(f"{question}\n{listed}\nAnswer:\n", choices[right], tuple(choices))


def _boolq(row: _Row) -> Pair:
    question = f"{row['passage']}\n\n{row['question'].rstrip('?').capitalize()}?"
    return _asked(question, ["no", "yes"], int(row["label"]))


def _piqa(row: _Row) -> Pair:
    question = f"How is this done? {row['goal']}"
    return _asked(question, [row["sol1"], row["sol2"]], int(row["label"]))


def _siqa(row: _Row) -> Pair:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _asked(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _hellaswag(row: _Row) -> Pair:
    question = f"{row['activity_label']}: {row['ctx']} … How does it go on?"
    return _asked(question, list(row["endings"]), int(row["label"]))


def _winogrande(row: _Row) -> Pair:
    question = f"What belongs in the place of the line? {row['sentence']}"
    return _asked(question, [row["option1"], row["option2"]], int(row["answer"]) - 1)


def _multiple_choice(question: str) -> Callable[[_Row], Pair]:
    """Return the reading of rows that name their choices, whose column `question` asks."""

    def pair(row: _Row) -> Pair:
        choices = row["choices"]
        return _asked(
            row[question], list(choices["text"]), choices["label"].index(row["answerKey"])
        )

    return pair


SETS = {
    "boolq": QuestionSet("aps/super_glue", "boolq", _boolq),
    "piqa": QuestionSet("baber/piqa", None, _piqa),
    "siqa": QuestionSet("lighteval/siqa", None, _siqa),
    "hellaswag": QuestionSet("Rowan/hellaswag", None, _hellaswag),
    "winogrande": QuestionSet("allenai/winogrande", "winogrande_xl", _winogrande),
    "arc_easy": QuestionSet("allenai/ai2_arc", "ARC-Easy", _multiple_choice("question"), "test"),
    "arc_challenge": QuestionSet(
        "allenai/ai2_arc", "ARC-Challenge", _multiple_choice("question"), "test"
    ),
    "openbookqa": QuestionSet(
        "allenai/openbookqa", "main", _multiple_choice("question_stem"), "test"
    ),
}
"""Name → a set, in the order in which they are read."""


def question_sets(data: DataOptions) -> HubSets:
    """Return the questions of all sets, as many as `drawn_sets` says.

    Args:
        data: its source is "hub", or a folder with copies, see `read_rows`.

    Raises:
        ConfigError: sizes beyond the data. DataError: a set cannot be had, or a row of it is
            another than its authors' description says.
    """
    learned: list[Pair] = []
    tests: dict[str, list[Pair]] = {}
    for name, question_set in SETS.items():
        learned += read_rows(
            data, question_set.source, question_set.subset, "train", question_set.pair
        )
        tests[name] = read_rows(
            data,
            question_set.source,
            question_set.subset,
            question_set.tested_on,
            question_set.pair,
        )
    return drawn_sets(data, learned, tests, TASK)
