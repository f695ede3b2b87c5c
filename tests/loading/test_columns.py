"""What records are recognized as, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evatune.errors import ConfigError, DataError
from evatune.loading.columns import find_records
from evatune.loading.records import Chat, Completion, Instruction, Origin
from evatune.loading.tables import load_table
from tests.loading.helpers import ASKED, FROM, SAID, records, write


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"messages": [ASKED, SAID], "text": "x"}, ("messages",), Chat([ASKED, SAID])),
        ({"conversations": FROM, "id": "3"}, ("conversations",), Chat([ASKED, SAID])),
        ({"talk": [ASKED, SAID]}, ("talk",), Chat([ASKED, SAID])),
        (
            {"prompt": [ASKED], "completion": [SAID]},
            ("prompt", "completion"),
            Chat([ASKED, SAID], 1),
        ),
        (
            {"prompt": "a", "completion": "b", "text": "x"},
            ("prompt", "completion"),
            Completion("a\n", "b"),
        ),
        ({"question": "a ", "answer": "b"}, ("question", "answer"), Completion("a ", "b")),
        (
            {"instruction": "a", "input": "b", "output": "c", "text": "abc"},
            ("instruction", "input", "output"),
            Instruction("a", "b", "c"),
        ),
        ({"instruction": "a", "output": "c"}, ("instruction", "output"), Instruction("a", "", "c")),
        ({"title": "x", "text": "a"}, ("text",), Completion("", "a")),
        ({"body": "a", "n": 1}, ("body",), Completion("", "a")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, (dict, tuple)) else "",
)
def test_each_shape_is_recognized_by_its_columns(
    tmp_path: Path, row: dict[str, Any], columns: tuple[str, ...], expected: Any
) -> None:
    found = records(tmp_path, row, row)
    assert found.layout.columns == columns
    assert list(found) == [expected, expected]


def test_columns_that_are_named_come_before_what_is_recognized(tmp_path: Path) -> None:
    row = {"messages": [ASKED, SAID], "a": "x", "b": "y", "c": "z"}
    assert list(records(tmp_path, row, columns=("a",))) == [Completion("", "x")]
    assert list(records(tmp_path, row, columns=("a", "b"))) == [Completion("x\n", "y")]
    assert list(records(tmp_path, row, columns=("a", "b", "c"))) == [Instruction("x", "y", "z")]
    with pytest.raises(ConfigError, match="--columns names 4 columns"):
        records(tmp_path, row, columns=("a", "b", "c", "messages"))


def test_answers_that_are_numbers_are_read_as_text(tmp_path: Path) -> None:
    for value, text in ((2, "2"), (-2.5, "-2.5"), (3.0, "3")):
        rows = [{"question": "q", "answer": value, "n": 1}, {"question": "r", "answer": None}]
        assert list(records(tmp_path, *rows)) == [Completion("q\n", text)]
        found = records(tmp_path, *rows, columns=("question", "answer"))
        assert list(found) == [Completion("q\n", text)]
    found = records(tmp_path, {"instruction": "a", "input": "b", "output": 1})
    assert list(found) == [Instruction("a", "b", "1")]
    assert list(records(tmp_path, {"text": "x", "question": "q", "answer": 1})) == [
        Completion("", "x")
    ]
    path = write(tmp_path / "a.csv", "question,answer\n1+1?,2\n2+2?,\n")
    assert list(find_records(load_table(path), (), Origin("a.csv"))) == [Completion("1+1?\n", "2")]


def test_rows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": answer} for answer in ("b", "", None, "  ")]
    assert len(records(tmp_path, *rows)) == 1
    with pytest.raises(DataError, match="holds no answer: every entry of column 'completion'"):
        records(tmp_path, *rows[1:])


@pytest.mark.parametrize(
    ("rows", "columns", "text"),
    [
        (
            [{"messages": [ASKED, SAID]}, {"prompt": "a", "completion": "b"}],
            (),
            "mixes shapes: 1 of its 2 rows hold prompt, completion and no messages",
        ),
        (
            [{"messages": [ASKED, SAID]}, {"messages": "hello"}],
            (),
            "mixes shapes: column 'messages' holds a list in row 1 and a string in row 2",
        ),
        ([{"text": "a"}, {"text": 3}], (), "column 'text' holds a string in row 1 and a number"),
        ([{"prompt": 1, "completion": 2}], (), "column 'prompt' .* does not hold strings"),
        ([{"n": 1, "text": "x"}], ("n",), "column 'n' .* does not hold strings; .* do: text"),
        (
            [{"messages": [ASKED, SAID], "text": "x"}],
            ("text", "messages"),
            "column 'messages' .* does not hold strings, but chats",
        ),
        ([{"text": "x"}], ("words",), "has no column 'words'; it has text"),
        ([{"chosen": "a", "rejected": "b", "prompt": "c"}], (), "preferences .*DPOTrainer"),
        ([{"a": "x", "b": "y"}], (), r"2 columns of strings \(a, b\); say which with --columns"),
        ([{"a": 1}], (), "none of the columns"),
    ],
    ids=range(10),
)
def test_what_cannot_be_told_is_refused_in_one_sentence(
    tmp_path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...], text: str
) -> None:
    with pytest.raises(DataError, match=text) as raised:
        records(tmp_path, *rows, columns=columns)
    assert "\n" not in str(raised.value)
