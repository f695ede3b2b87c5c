"""Splits of folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from evatune.errors import DataError
from evatune.loading.tables import load_split, load_table
from tests.loading.helpers import write


def save_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(folder / name)


def test_no_picture_is_left_out_for_the_name_of_its_class(tmp_path: Path) -> None:
    names = [f"{kind}/{number}.png" for kind in ("train", "car", "bus") for number in (1, 2)]
    save_pictures(tmp_path / "a", *names)
    with pytest.raises(
        DataError,
        match=r"4 of the files of folder .*'bus/1.png'.* split \(train\); move all that it holds",
    ):
        load_split(tmp_path / "a", "train")
    save_pictures(tmp_path / "b" / "train", *names)
    table = load_split(tmp_path / "b", "train")
    assert len(table) == 6
    assert table.features["label"].names == ["bus", "car", "train"]


def test_files_of_a_folder_are_read_alike_with_and_without_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "a.txt", "\ufefftwo\nlines\n")
    write(tmp_path / "texts" / "b.txt", "one")
    write(tmp_path / "cells" / "a.csv", "text\nNA\nNone\n")
    write(tmp_path / "tabs" / "a.tsv", 'text\tlabel\n"Oh" she said\t1\n')
    for name, texts in {
        "texts": ["two\nlines\n", "one"],
        "cells": ["NA", "None"],
        "tabs": ['"Oh" she said'],
    }.items():
        folder = tmp_path / name
        assert load_table(folder)["text"] == load_split(folder, "train")["text"] == texts
    write(tmp_path / "records" / "a.jsonl", "[1]\n")
    for load in (load_table, load_split):
        with pytest.raises(DataError, match=r"a\.jsonl"):
            load(tmp_path / "records", "train")


def test_no_file_is_left_out_for_the_name_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for name in ("train_1", "test_1"):
        write(folder / f"{name}.jsonl", '{"text": "x"}\n')
    write(folder / ".b.jsonl", '{"text": "hidden"}\n')
    write(folder / "notes.txt", "of another kind")
    assert [len(load_split(folder, split)) for split in ("train", "test")] == [1, 1]
    write(folder / "more.jsonl", '{"text": "x"}\n')
    with pytest.raises(DataError, match=r"1 of the files .*'more.jsonl'.* \(train, test\); move"):
        load_split(folder, "train")
    listed = "---\nconfigs:\n- config_name: default\n  data_files: train_1.jsonl\n---\n"
    write(folder / "README.md", listed)
    assert len(load_split(folder, "train")) == 1
    (folder / "README.md").unlink()
    own = "---\nconfigs:\n- config_name: default\n  data_files: a.txt\n  sample_by: line\n---\n"
    write(tmp_path / "lines" / "README.md", own)
    write(tmp_path / "lines" / "a.txt", "two\nlines\n")
    assert len(load_split(tmp_path / "lines", "train")) == 2
    for path in folder.glob("*.jsonl"):
        path.rename(write(folder / "train" / path.name, ""))
    assert len(load_split(folder, "train")) == 3
