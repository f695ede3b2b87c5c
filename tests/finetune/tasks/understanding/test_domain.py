"""Language understanding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evatune.finetune.recipe_files import load
from evatune.finetune.tasks import Task
from evatune.finetune.tasks.understanding import domain
from tests.finetune.helpers import small

torch.set_num_threads(1)


def _prepared(texts: list[str], monkeypatch: pytest.MonkeyPatch, model: Path) -> Task:
    """The word "w7" is in the texts of class 2."""
    labels = [2 if "w7" in text.lower().split() else i % 2 for i, text in enumerate(texts)]
    monkeypatch.setattr(domain, "bbc", lambda: (texts, labels))
    return domain.prepare(small(model, "data.train=20", "data.test=10"))


def _inputs(rows: Any) -> list[list[int]]:
    return [list(row["input_ids"]) for row in rows]


def test_every_text_keeps_its_class(monkeypatch: pytest.MonkeyPatch, bert_folder: Path) -> None:
    texts = [f"w{i} w{20 + i} " + ("w7" if i % 3 == 0 else "w50") for i in range(30)]
    task = _prepared(texts, monkeypatch, bert_folder)
    for rows in (task.train, task.test):
        for row in rows:
            first, _, last = (number - 2 for number in row["input_ids"])  # w0 is token 2
            assert row["labels"] == (2 if 7 in (first, last) else first % 2)
    assert task.model.config.num_labels == 3


def test_texts_that_differ_in_spaces_and_capitals_alone_are_not_in_both_parts(
    monkeypatch: pytest.MonkeyPatch, bert_folder: Path
) -> None:
    first = [f"w{i} w{i % 3} w7" for i in range(20, 50)]
    again = [text.upper() for text in first] + [f" {text}\n".replace(" ", "  ") for text in first]
    task = _prepared(first + again, monkeypatch, bert_folder)
    found = sorted(row[0] - 2 for row in _inputs(task.train) + _inputs(task.test))
    assert found == list(range(20, 50))


def test_what_is_tested_goes_by_length(monkeypatch: pytest.MonkeyPatch, bert_folder: Path) -> None:
    texts = [" ".join([f"w{i}"] * (1 + i * 7 % 30)) for i in range(30)]
    lengths = [len(row) for row in _inputs(_prepared(texts, monkeypatch, bert_folder).test)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 10


def test_a_model_is_of_float32_though_its_checkpoint_is_of_float16() -> None:
    sizes = ("data.train=8", "data.test=8", "data.validation=0")
    model = domain.prepare(load("understanding-agreement", sizes)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
