"""The user's own data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evatune.errors import DataError
from evatune.finetune.tasks import understanding
from tests.finetune.helpers import small

torch.set_num_threads(1)


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_texts_of_the_user_are_read(columns: list[str], bert_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"w{i} w2", "other": "w3", "label": "yes" if i % 2 else "no"} for i in range(40)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [
        "task=mine",
        f"data.source={tmp_path / 'mine.jsonl'}",
        f"data.columns={columns}",
        "data.train=24",
        "data.test=16",
    ]
    task = understanding.prepare(small(bert_folder, *own))
    assert len(task.train) == 24
    assert set(task.train["labels"]) == {0, 1}
    assert set(map(len, task.train["input_ids"])) == {1 + len(columns)}


@pytest.mark.parametrize(
    ("label", "more", "text"),
    [
        (7, [], "holds the label 7; its 2 classes must be names, or numbers from 0 to 1"),
        (1, ["data.label_column=class"], "has no column 'class'; it has text, label"),
        (1, ["data.columns=[words]"], "has no column 'words'; it has text, label"),
        (1, ["data.train_split=first"], "first"),
    ],
)
def test_mistakes_in_data_of_the_user_name_the_column(
    label: int, more: list[str], text: str, bert_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": "w1 w2", "label": label if i % 2 else 0} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=text):
        understanding.prepare(
            small(
                bert_folder,
                "task=mine",
                f"data.source={tmp_path / 'mine.jsonl'}",
                "data.train=24",
                "data.test=16",
                *more,
            )
        )
