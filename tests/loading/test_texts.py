"""Texts of files and hubs, and batches of their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from evatune.errors import ConfigError, DataError
from evatune.loading.batches import TextBatches
from evatune.loading.demo import demo_data
from evatune.loading.texts import load_texts
from tests.conftest import sentences, tiny_tokenizer
from tests.loading.helpers import texts_of, write

torch.set_num_threads(1)


def test_a_text_file_holds_a_text_per_line_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.txt", "one\n\n  \ntwo\n")) == ["one", "two"]


def test_a_folder_of_text_files_holds_a_text_per_file(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.txt", "one\nmore")
    write(tmp_path / "d" / "sub" / "b.TXT", "two")
    write(tmp_path / "d" / "notes.md", "not this")
    assert texts_of(tmp_path / "d") == ["one\nmore", "two"]


def test_the_demo_data_are_read_though_one_document_is_not_utf8() -> None:
    assert sum("�" in text for text in texts_of(demo_data() / "sports")) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,n\n"one, more",1\ntwo,2\n'),
        ("a.tsv", "text\tn\none, more\t1\ntwo\t2\n"),
        ("a.jsonl", '{"text": "one, more", "n": 1}\n{"text": "two", "n": 2}\n'),
        ("a.json", json.dumps([{"text": "one, more", "n": 1}, {"text": "two", "n": 2}])),
    ],
)
def test_every_kind_of_table_gives_its_texts(tmp_path: Path, name: str, content: str) -> None:
    assert texts_of(write(tmp_path / name, content)) == ["one, more", "two"]


def test_the_only_column_of_strings_is_the_text(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.csv", "n,body\n1,one\n")) == ["one"]


def test_a_column_called_text_comes_before_others(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.csv", "body,text\nno,yes\n")) == ["yes"]


def test_a_named_column_comes_before_one_called_text(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.csv", "body,text\nno,yes\n"), "body") == ["no"]


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column 'n' .* does not hold strings; columns that do: text"
    ):
        load_texts(write(tmp_path / "a.csv", "text,n\nx,1\n"), "n")


def test_missing_entries_are_left_out(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "one"}\n')) == ["one"]


def test_a_part_of_a_file_can_be_named(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.txt", "one\ntwo\nthree\n"), split="train[:2]") == [
        "one",
        "two",
    ]


def test_a_text_column_without_strings_is_said_to_be_that(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ["a"], "b": "x"}\n')
    with pytest.raises(
        DataError, match=r"column 'text' .* does not hold strings; columns that do: b"
    ):
        load_texts(path)


def some_batches(**options: Any) -> TextBatches:
    rows = datasets.Dataset.from_dict({"text": sentences(10)})
    defaults = {
        "tokenizer": tiny_tokenizer(),
        "texts": rows,
        "batch_size": 4,
        "max_length": 32,
        "seed": 0,
    }
    return TextBatches(**(defaults | options))


def test_batches_are_the_same_each_time_and_hold_every_text_once() -> None:
    batches = some_batches()
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
    )
    seen = sorted(tuple(row) for batch in first for row in batch["input_ids"].tolist())
    expected = tiny_tokenizer()(list(batches.texts["text"]))["input_ids"]
    assert seen == sorted(map(tuple, expected))


def test_the_seed_decides_the_order() -> None:
    a, b = (next(iter(some_batches(seed=seed)))["input_ids"] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_long_texts_are_cut_at_the_shorter_limit() -> None:
    assert next(iter(some_batches(max_length=5)))["input_ids"].shape == (4, 5)
    short = some_batches(tokenizer=tiny_tokenizer(model_max_length=7))
    assert next(iter(short))["input_ids"].shape == (4, 7)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_very_long_text_gives_the_tokens_that_it_would_give_whole(side: str) -> None:
    read: list[int] = []

    class Counted(transformers.PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, texts: list[str], **options: Any) -> Any:
            read.append(max(map(len, texts)))
            return super().__call__(texts, **options)

    plain = tiny_tokenizer(truncation_side=side)
    tokenizer = Counted(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        truncation_side=side,
    )
    long = " ".join(sentences(5000))
    batches = some_batches(tokenizer=tokenizer, texts=datasets.Dataset.from_dict({"text": [long]}))
    found = next(iter(batches))["input_ids"].tolist()
    assert found == plain([long], truncation=True, max_length=32)["input_ids"]
    assert read[0] < len(long) / 100


@pytest.mark.parametrize(
    "option", [{"batch_size": 0}, {"max_length": 0}, {"seed": -1}, {"seed": 2**63}]
)
def test_sizes_and_seeds_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is "):
        some_batches(**option)
