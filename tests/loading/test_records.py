"""What a row holds, and how records are described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evatune.errors import DataError
from evatune.loading.records import Chat
from tests.loading.helpers import ASKED, SAID, records


def test_messages_are_taken_in_the_forms_that_occur(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": text} for text in ("h", None, "i")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    found = records(tmp_path, {"messages": [{"role": "user", "content": parts}, SAID, call]})
    assert list(found) == [Chat([ASKED, SAID, call | {"content": ""}])]


def test_one_sentence_says_what_was_recognized(tmp_path: Path) -> None:
    found = records(tmp_path, {"messages": [ASKED, SAID]})
    assert found.describe(len(found), template=True) == (
        "mine.jsonl: 1 chats in column messages, read by the chat template; only the assistant's"
        " tokens count (--columns reads other columns)"
    )


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}, SAID], "content is no text"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}, SAID], "content is no text"),
        ([ASKED, {"role": None, "content": "x"}], "holds a message without a role"),
    ],
)
def test_a_message_that_is_none_is_refused(tmp_path: Path, messages: Any, text: str) -> None:
    with pytest.raises(DataError, match=f"a chat of 'mine.jsonl' {text}|{text}"):
        list(records(tmp_path, {"messages": messages}))
