"""The records of a data set: chats, prompts with completions, instructions, or texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evatune.errors import DataError
from evatune.loading.file_checks import json_name
from evatune.utils.text import listed

Kind = Literal["chat", "completion", "instruction", "text"]

_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class Origin:
    """The source of records, and the options that read them in another way."""

    source: str
    columns: str = "--columns"
    template: str = "--chat-template"
    labels: str = "--label-column"


@dataclass(frozen=True)
class Layout:
    """The kind of a data set's records, and the columns that hold them."""

    kind: Kind
    columns: tuple[str, ...]

    @property
    def has_answers(self) -> bool:
        """True if a part of each record is to be learned, and the rest is not."""
        return self.kind != "text"


@dataclass(frozen=True)
class Chat:
    """Messages {"role", "content", …}; the first `given` of them are part of the prompt."""

    messages: list[dict[str, Any]]
    given: int = 0


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that is to follow it; a text alone has no prompt."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Instruction:
    """Alpaca's record: what is to be done, with what, and how it is done."""

    instruction: str
    given: str
    answer: str


Record = Chat | Completion | Instruction


@dataclass(frozen=True)
class Records:
    """Records of one layout; those without an answer or a text are left out.

    Attributes:
        table: a `datasets.Dataset`.
    """

    table: Any
    layout: Layout
    origin: Origin

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Record]:
        for row in self.table:
            yield self.record(row)

    def select(self, indices: Sequence[int]) -> Records:
        return replace(self, table=self.table.select(indices))

    def record(self, row: dict[str, Any]) -> Record:
        """Return what a row of the table holds. DataError for a message that is none."""
        values = [row[column] for column in self.layout.columns]
        if self.layout.kind == "chat":
            given = [] if len(values) == 1 else self._messages(values[0])
            return Chat([*given, *self._messages(values[-1])], len(given))
        texts = [value or "" for value in values]
        if self.layout.kind == "text":
            return Completion("", texts[0])
        if self.layout.kind == "completion":
            return Completion(*joined(*texts))
        return Instruction(texts[0], texts[1] if len(texts) == 3 else "", texts[-1])

    def describe(self, count: int, *, template: bool, masked: bool = True) -> str:
        """Return one sentence that says what was recognized and how it is read.

        Args:
            count: of records, all splits together.
            template: whether a chat template renders instructions.
            masked: whether what is no answer is left out.
        """
        what, how, part = {
            "chat": ("chats", "by the chat template", "the assistant's"),
            "completion": ("prompts with completions", "as they are", "the completions'"),
            "instruction": (
                "instructions with outputs",
                "by the chat template" if template else "in Alpaca's words",
                "the outputs'",
            ),
            "text": ("texts", "", ""),
        }[self.layout.kind]
        columns = (
            f"column{'s' if len(self.layout.columns) > 1 else ''} {listed(self.layout.columns)}"
        )
        said = f"{self.origin.source}: {count:,} {what} in {columns}"
        if not self.layout.has_answers:
            return f"{said}; every token counts"
        counted = f"only {part} tokens count" if masked else "every token counts"
        return f"{said}, read {how}; {counted} ({self.origin.columns} reads other columns)"

    def _messages(self, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise self._no_messages(f"is {json_name(type(value))}, and no list")
        return [self._message(message) for message in value]

    def _message(self, value: Any) -> dict[str, Any]:
        """Return a message by the keys that chat templates know."""
        if not isinstance(value, dict):
            raise self._no_messages("holds a message that is no object")
        message = {key: inner for key, inner in value.items() if inner is not None}
        if "from" in message and "value" in message:
            speaker = message.pop("from")
            message |= {"role": _ROLES.get(speaker, speaker), "content": message.pop("value")}
        if not isinstance(message.get("role"), str):
            raise self._no_messages("holds a message without a role")
        content = message.setdefault("content", "")
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            message["content"] = "".join(part["text"] or "" for part in content)
        elif not isinstance(content, str):
            raise self._no_messages("holds a message whose content is no text")
        return message

    def _no_messages(self, problem: str) -> DataError:
        return DataError(
            f"a chat of {self.origin.source!r} {problem}; write each chat as a list of messages"
            ' such as {"role": "user", "content": "…"}'
        )


def joined(prompt: str, answer: str) -> tuple[str, str]:
    """Return prompt and answer, with a new line between where nothing else parts them."""
    parted = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return (prompt if parted else f"{prompt}\n"), answer


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text", 0), str | None)
    )
