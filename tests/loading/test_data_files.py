"""Files and folders of data: which are read, and which one is at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from evatune.errors import DataError
from evatune.loading.tables import load_table
from evatune.loading.texts import load_texts
from tests.loading.helpers import texts_of, write


def test_files_of_one_kind_in_a_folder_come_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path / "d" / "2.jsonl", '{"text": "two"}\n')
    write(tmp_path / "d" / "1.jsonl", '{"text": "one"}\n')
    assert texts_of(tmp_path / "d") == ["one", "two"]


def test_a_saved_data_set_is_read_with_and_without_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["one"]})
    one.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(
        train=one, test=datasets.Dataset.from_dict({"text": ["two"]})
    ).save_to_disk(tmp_path / "splits")
    assert texts_of(tmp_path / "plain") == ["one"]
    assert texts_of(tmp_path / "splits") == ["one"]
    assert texts_of(tmp_path / "splits", split="test") == ["two"]
    with pytest.raises(DataError, match="no split 'dev'; choose one of train, test"):
        load_texts(tmp_path / "splits", split="dev")
    with pytest.raises(DataError, match="no split 'test'; choose one of train"):
        load_texts(tmp_path / "plain", split="test")


def test_a_file_has_one_split_of_which_parts_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n")
    assert texts_of(path, split="train[:1]") == ["one"]
    with pytest.raises(DataError, match=r"a\.txt' has no split 'dev'; choose one of train$"):
        load_texts(path, split="dev")


@pytest.mark.parametrize(
    "name", ["x[1].jsonl", "a*.jsonl", "q?.jsonl", "b[!x].jsonl", "d[1]/a.jsonl", "{a}.jsonl"]
)
def test_a_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("x1.jsonl", "ab.jsonl", "qq.jsonl", "by.jsonl", "d1/a.jsonl", "a.jsonl"):
        write(tmp_path / other, '{"text": "another file"}\n')
    assert texts_of(write(tmp_path / name, '{"text": "this file"}\n')) == ["this file"]


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    for word in ("one", "two2"):
        assert texts_of(write(tmp_path / "a.jsonl", f'{{"text": "{word}"}}\n')) == [word]


@pytest.mark.parametrize(("ending", "sep"), [("csv", ","), ("tsv", "\t")])
def test_words_that_pandas_takes_for_gaps_are_texts(tmp_path: Path, ending: str, sep: str) -> None:
    words = ["None", "null", "N/A", "NA", "nan", ""]
    rows = [f"{word}{sep}{number}" for word, number in zip(words, (1, 2, "", 4, 5, 6), strict=True)]
    table = load_table(write(tmp_path / f"a.{ending}", "\n".join([f"text{sep}n", *rows])))
    assert table["text"][:] == [*words[:-1], None]
    assert table["n"][:] == [1, 2, None, 4, 5, 6]


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (['"starts\ta', "plain\tb", 'end" of it\ta'], ['"starts', "plain", 'end" of it']),
        (['"starts\ta', "plain\tb", 'ends"\ta'], ['"starts', "plain", 'ends"']),
        (['"all"\ta', '"Go," he said\tb'], ['"all"', '"Go," he said']),
        (['x "y"\ta'], ['x "y"']),
        (['"he said ""hi"""\ta', '""\tb', "x\tc"], ['he said "hi"', None, "x"]),
        (['"a\tb"\tc', '"a\n\nb"\td'], ["a\tb", "a\n\nb"]),
    ],
)
def test_quotes_of_a_table_with_tabs_are_text_unless_all_cells_close(
    tmp_path: Path, lines: list[str], texts: list[str | None]
) -> None:
    for end in ("\n", "\r\n"):
        content = end.join(["text\tlabel", *lines]) + end
        assert load_table(write(tmp_path / "a.tsv", content))["text"][:] == texts


def test_a_table_with_tabs_is_read_as_pandas_writes_it(tmp_path: Path) -> None:
    for columns in (1, 2):
        frame = pd.DataFrame({"text": ['"', 'a "b"', "c\nd", "e\tf", '"g"', "h"]})
        for column in range(1, columns):
            frame[f"n{column}"] = range(6)
        frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
        assert load_table(tmp_path / "a.tsv")["text"][:] == frame["text"].to_list()


def test_the_mark_of_an_encoding_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "d" / "a.txt", "\ufeffone\ntwo\n")
    assert texts_of(path) == ["one", "two"]
    assert texts_of(tmp_path / "d") == ["one\ntwo\n"]
    for quote in ("", '"'):
        path = write(tmp_path / "a.tsv", f"\ufefftext\tn\n{quote}one\t2\n")
        assert load_table(path).column_names == ["text", "n"]


def test_hidden_files_and_what_systems_leave_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden above" / "d"
    write(folder / "a.jsonl", '{"text": "one"}\n')
    for name in (
        "._a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".a.csv",
        "__MACOSX/a.jsonl",
        "b.csv/c",
    ):
        write(folder / name, b"\0\5\x16\7")
    assert texts_of(folder) == ["one"]
    assert texts_of(write(folder / ".b.jsonl", '{"text": "asked for"}\n')) == ["asked for"]


@pytest.mark.parametrize(
    ("names", "contents", "fault", "parts"),
    [
        (
            "abc.csv",
            ["text\nx\n", "text\ny\n", "no header\nmore\n"],
            "c",
            r"other columns \(no header .*a.csv.*first line",
        ),
        (
            "abcd.jsonl",
            ['{"text": "x"}', '{"text": "y"}', '{"body": "z"}', '{"text": "w"}'],
            "c",
            r"other columns \(body of",
        ),
        (
            "ab.csv",
            ["text\nx\n", 'text,n\n"a,2\n3,4\n'],
            "b",
            "cannot be read: .*EOF inside string",
        ),
        (
            "ab.parquet",
            [{"text": ["x"]}, {"body": ["y"]}],
            "b",
            r"other columns \(body of string\)",
        ),
        (
            "abc.parquet",
            [{"text": ["x"]}, "PAR1", {"text": ["x"]}],
            "b",
            "cannot be read: .*Parquet",
        ),
    ],
)
def test_the_file_at_fault_is_named(
    tmp_path: Path, names: str, contents: list[Any], fault: str, parts: str
) -> None:
    stem, _, ending = names.partition(".")
    for name, content in zip(stem, contents, strict=True):
        path = tmp_path / "d" / f"{name}.{ending}"
        if isinstance(content, str):
            write(path, content)
        else:
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(content).to_parquet(path)
    with pytest.raises(DataError, match=parts) as raised:
        load_texts(tmp_path / "d")
    assert str(raised.value).startswith(repr(str(tmp_path / "d" / f"{fault}.{ending}")))
