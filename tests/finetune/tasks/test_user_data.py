"""The user's own data: what is implied, what is cut off, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe_files import load
from evatune.finetune.recipe_tree import as_tree, parse
from evatune.finetune.tasks import generation, understanding
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
        (None, [], r"holds no label in row 2 \(20 of 40 rows have none\); fill it in"),
        (
            1,
            ["data.label_column=class"],
            "no column 'class' with the classes; it has text, label: name .* data.label_column",
        ),
        (1, ["data.columns=[words]"], "has no column 'words'; it has text, label"),
        (1, ["data.train_split=first"], "first"),
    ],
)
def test_mistakes_in_data_of_the_user_name_the_column(
    label: int | None, more: list[str], text: str, bert_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"w1 w{i}", "label": label if i % 2 else 0} for i in range(40)]
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


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"w{i} w1"},
            {"role": "assistant", "content": f"w{i}"},
        ]
    }
    for i in range(30)
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w50 {% else %}w51 {% endif %}"
    "{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w51 {% endif %}"
)


def test_data_of_the_user_imply_the_tasks_name_and_its_sizes(
    llama_folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "talks.jsonl", CHATS)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    recipe = load(
        "generation-reviews",
        [
            f"data.source={path}",
            f"data.chat_template={tmp_path / 'chat.jinja'}",
            f"model={llama_folder}",
        ],
    )
    assert recipe.task == "own-talks"
    assert parse(as_tree(recipe)) == recipe
    task = generation.prepare(recipe)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [24, 3, 3]
    for row in task.train:
        (number,) = (label for label in row["labels"] if label != -100)
        assert row["input_ids"] == [52, number, 3, 53, number]
    assert task.about == (
        f"{path}: 30 chats in column messages, read by the chat template; only the assistant's"
        " tokens count (data.columns reads other columns); 24 to train on, cut off 3 for"
        " validation, 3 for the test"
    )
    with pytest.raises(DataError, match=r"no chat template; give data\.chat_template a Jinja file"):
        generation.prepare(replace(recipe, data=replace(recipe.data, chat_template=None)))


def test_the_papers_code_is_learned_from_chats(llama_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "code.jsonl", CHATS)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    here = [f"data.source={path}", f"data.chat_template={tmp_path / 'chat.jinja'}"]
    sizes = ["data.validation=3", "data.test=3", f"model={llama_folder}"]
    task = generation.prepare(load("paper-code", [*here, *sizes]))
    assert [len(part) for part in (task.train, task.validation, task.test)] == [24, 3, 3]
    assert all(sum(label != -100 for label in row["labels"]) == 1 for row in task.train)


def test_a_recipe_for_own_data_asks_for_them() -> None:
    with pytest.raises(
        ConfigError, match=r"recipes for your own data need them: give data\.source"
    ):
        generation.prepare(load("own-generation"))


def test_sizes_that_are_given_hold_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"text": f"text {i}"} for i in range(40)])

    def sizes(*more: str) -> list[int | None]:
        task = generation.prepare(load("own-generation", [f"data.source={path}", *more]))
        parts = (task.train, task.validation, task.test)
        return [None if part is None else len(part) for part in parts]

    assert sizes("data.test=10") == [26, 4, 10]
    assert sizes("data.train=5") == [5, None, 4]
    assert sizes("data.train=5", "data.validation=6", "data.test=7") == [5, 6, 7]


def test_a_recipe_for_data_of_its_own_keeps_its_task_when_their_place_changes() -> None:
    recipe = load("paper-metamath", ["data.source=./mirror"])
    assert (recipe.task, recipe.data.train) == (
        load("paper-metamath").task,
        load("paper-metamath").data.train,
    )


@pytest.mark.parametrize(
    ("rows", "more", "text"),
    [
        (CHATS, ["data.columns=[messages, other]"], "has no column 'other'; it has messages"),
        ([{"n": 1}] * 9, ["data.columns=[n]"], "column 'n' .* does not hold strings"),
        ([{"text": "a"}, {"text": "b"}], [], "has 2 examples; give at least 3: to train on"),
        ([*CHATS, {"text": "a"}], [], "mixes shapes: 1 of its 31 rows hold text and no messages"),
    ],
    ids=range(4),
)
def test_data_that_cannot_be_read_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], more: list[str], text: str
) -> None:
    path = write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(DataError, match=text):
        generation.prepare(load("own-generation", [f"data.source={path}", *more]))


@pytest.mark.parametrize("key", ["data.test_split=train", "data.more_test_splits=[train]"])
def test_what_is_trained_on_is_not_tested(key: str, bert_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"text": f"w{i}", "label": i % 2} for i in range(40)])
    with pytest.raises(ConfigError, match=r"'train' is data\.train_split and a split to test on"):
        understanding.prepare(small(bert_folder, "task=mine", f"data.source={path}", key))


def test_rows_without_a_text_are_left_out(bert_folder: Path, tmp_path: Path) -> None:
    said = [None] * 20 + [" "] * 20 + [f"w1 w{i}" for i in range(20)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(said)]
    path = write(tmp_path / "mine.jsonl", rows)
    sizes = ("data.train=16", "data.test=4")
    task = understanding.prepare(small(bert_folder, "task=mine", f"data.source={path}", *sizes))
    assert {len(ids) for part in (task.train, task.test) for ids in part["input_ids"]} == {2}
    path = write(tmp_path / "mine.jsonl", rows[:40])
    with pytest.raises(DataError, match="holds no text: every entry of text is empty"):
        understanding.prepare(small(bert_folder, "task=mine", f"data.source={path}", *sizes))


def test_texts_are_cut_to_what_the_model_can_read(llama_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"text": "w1 " * 3000 + f"w{i}"} for i in range(8)])
    settings = [f"model={llama_folder}", f"data.source={path}", "data.max_length=9999"]
    task = generation.prepare(load("own-generation", settings))
    longest = max(len(row["input_ids"]) for row in [*task.train, *task.test])
    assert 60 < longest <= task.model.config.max_position_embeddings == 64


def test_what_is_said_twice_is_not_in_two_parts(
    bert_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"w1 w{i}", "label": i % 2} for i in range(20)] * 2
    path = write(tmp_path / "mine.jsonl", rows)
    sizes = ("data.train=16", "data.test=4")
    with pytest.warns(UserWarning, match="20 of the 40 examples .* repeat an earlier one"):
        task = understanding.prepare(small(bert_folder, "task=mine", f"data.source={path}", *sizes))
    parts = [{tuple(row["input_ids"]) for row in part} for part in (task.train, task.test)]
    assert (len(parts[0]), len(parts[1]), parts[0] & parts[1]) == (16, 4, set())
    with pytest.warns(UserWarning, match="20 of the 40 examples"):
        generation.prepare(load("own-generation", [f"model={llama_folder}", f"data.source={path}"]))


def test_a_size_of_0_is_for_data_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is 0, which is for data\.source"):
        load("generation-reviews", ["data.train=0"])
