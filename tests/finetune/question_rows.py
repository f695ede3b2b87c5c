"""Stand-ins of the eight sets of questions: their columns and splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from evatune.finetune.tasks.generation.question_sets import SETS


def rows(name: str, count: int = 6) -> list[dict[str, Any]]:
    """Rows with the columns and label types of one of the sets."""
    if name == "boolq":
        return [
            {"question": f"is w{n} so", "passage": f"w{n} w2", "idx": n, "label": n % 2}
            for n in range(count)
        ]
    if name == "piqa":
        return [
            {"goal": f"w{n}", "sol1": "w1", "sol2": "w2 w3", "label": n % 2} for n in range(count)
        ]
    if name == "siqa":
        answers = {"answerA": "w1", "answerB": "w2", "answerC": "w3"}
        return [
            {"context": f"w{n}", "question": "w4", **answers, "label": str(1 + n % 3)}
            for n in range(count)
        ]
    if name == "hellaswag":
        endings = ["w1", "w2", "w3", "w4"]
        return [
            {"activity_label": "w5", "ctx": f"w{n}", "endings": endings, "label": str(n % 4)}
            for n in range(count)
        ]
    if name == "winogrande":
        return [
            {"sentence": f"w{n} _ w2", "option1": "w3", "option2": "w4", "answer": str(1 + n % 2)}
            for n in range(count)
        ]
    asked = "question_stem" if name == "openbookqa" else "question"
    choices = {"text": ["w1", "w2", "w3"], "label": ["A", "B", "C"]}
    return [{asked: f"w{n}", "choices": choices, "answerKey": "ABC"[n % 3]} for n in range(count)]


def save_set(folder: Path, name: str, parts: dict[str, list[dict[str, Any]]]) -> None:
    one = SETS[name]
    save_rows(folder / one.source / (one.subset or ""), parts)


def save_rows(place: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    """Write the rows of each split as `datasets` saves them."""
    place.mkdir(parents=True, exist_ok=True)
    tables = {part: datasets.Dataset.from_list(some) for part, some in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(place)
