"""What is wrong in a file, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from evatune.errors import DataError
from evatune.loading.texts import load_texts
from tests.loading.helpers import texts_of, write


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "latin.csv",
            "text\none\ncaf\xe9\n".encode("latin-1"),
            "UTF-8: line 3 .* 0xe9 .*Latin-1.*iconv",
        ),
        ("latin.txt", b"one\ncaf\xe9\n", "UTF-8: line 2 .* 0xe9 .*Latin-1.*iconv"),
        (
            "latin.jsonl",
            '{"text": "a"}\n{"text": "\xe9"}\n'.encode("latin-1"),
            "UTF-8: line 2 .* 0xe9 .*iconv",
        ),
        ("wide.tsv", "text\none\n".encode("utf-16"), "UTF-8: line 1 .* 0xff .*UTF-16"),
        ("cut.csv", "text\none\ncaf\xe9".encode()[:-1], "UTF-8: line 3 .* 0xc3 "),
        ("null.jsonl", b"null\n", "line 1 .* is null"),
        ("later.jsonl", b'{"text": "a"}\n  null\n', "line 2 .* is null"),
        ("list.json", b'[{"text": "a"}, null]', "entry 2 .* is null"),
        ("number.jsonl", b"1\n2\n", "line 1 .* is a number"),
        ("mixed.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 .* is a list"),
        ("none.json", b"[]", "is empty"),
        ("torn.jsonl", b'{"text": "a"}\n{"text"', "line 2 .* is not JSON"),
        (
            "deep.jsonl",
            b'{"text": "a", "b": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
            "line 1 .* nested too deeply",
        ),
        ("a::b.jsonl", b'{"text": "a"}\n', "'::' in its name"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(
    tmp_path: Path, name: str, content: bytes, parts: str
) -> None:
    with pytest.raises(DataError, match=parts) as raised:
        load_texts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b'[\n{"text": "one"},\n{"text": "two"}\n]',
        b'["one", "two"]',
        b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}',
    ],
)
def test_the_forms_of_json_that_hold_records_are_read(tmp_path: Path, content: bytes) -> None:
    assert texts_of(write(tmp_path / "a.json", content)) == ["one", "two"]
