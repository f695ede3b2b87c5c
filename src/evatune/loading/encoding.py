"""Tokens and labels of records: what is to be learned has labels, the rest has none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from evatune.choices import IGNORED
from evatune.errors import DataError
from evatune.loading.chats import tokens_of
from evatune.loading.records import Chat, Completion, Instruction, Origin, Record, Records
from evatune.loading.texts import CHARACTERS_PER_TOKEN

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Encoder:
    """Makes tokens and labels of records.

    Attributes:
        longest: tokens of a record, beyond which it is cut.
        origin: what messages name.
    """

    tokenizer: Any
    longest: int
    origin: Origin

    def __call__(self, record: Record) -> Row:
        """Return input_ids, attention_mask and labels, -100 for tokens without a loss."""
        if isinstance(record, Instruction) and self.tokenizer.chat_template:
            record = as_chat(record)
        if isinstance(record, Chat):
            return self._chat(record)
        pair = as_completion(record)
        return encode_answer(self.tokenizer, pair.prompt, pair.answer, self.longest)

    def rows(self, records: Records) -> list[Row]:
        """Return the records that have something to learn, encoded. DataError where none has."""
        rows = [row for row in map(self, records) if has_loss(row)]
        require_rows(rows, self.origin)
        return rows

    def _chat(self, chat: Chat) -> Row:
        tokens, said = tokens_of(self.tokenizer, chat, self.origin)
        start = _window(said, self.longest)
        begins = bool(tokens) and tokens[0] == self.tokenizer.bos_token_id
        tokens = tokens[start : start + self.longest]
        said = said[start : start + self.longest]
        if start and begins:  # with the token with which every text begins
            tokens, said = [self.tokenizer.bos_token_id, *tokens[1:]], [False, *said[1:]]
        pairs = zip(tokens, said, strict=True)
        labels = [token if is_answer else IGNORED for token, is_answer in pairs]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def has_loss(row: Row) -> bool:
    """Return whether a token of the row is to be learned, from one before it."""
    return any(label != IGNORED for label in row["labels"][1:])


def require_rows(rows: Iterable[Any], origin: Origin) -> None:
    """Raise a DataError where no record has anything to learn."""
    if not any(True for _ in rows):
        raise DataError(
            f"no chat of {origin.source!r} has an answer of the assistant that the chat template"
            f" lets be found; give chats with answers, or with {origin.template} a template with"
            " {% generation %} marks around them"
        )


def encode_answer(tokenizer: Any, prompt: str, answer: str, longest: int) -> Row:
    """Return the tokens of prompt and answer with an end, and labels on the answer only.

    What is too long is cut: the answer's end, then the prompt's start, but not the token before it
    with which every text begins.
    """
    # Tokenizers take minutes for what is cut afterwards.
    characters = longest * CHARACTERS_PER_TOKEN
    start = _special(tokenizer.bos_token_id)
    asked = tokenizer(prompt[-characters:], add_special_tokens=False)["input_ids"]
    after = tokenizer(answer[:characters], add_special_tokens=False)["input_ids"]
    after = [*after, *_special(tokenizer.eos_token_id)][: longest - 1]
    room = longest - len(after)
    before = [*start, *asked[max(0, len(asked) + len(start) - room) :]][:room]
    return {
        "input_ids": before + after,
        "attention_mask": [1] * (len(before) + len(after)),
        "labels": [IGNORED] * len(before) + after,
    }


def as_chat(record: Instruction) -> Chat:
    """Return an instruction as a question with its answer."""
    asked = "\n\n".join(part for part in (record.instruction, record.given) if part)
    question = {"role": "user", "content": asked}
    return Chat([question, {"role": "assistant", "content": record.answer}])


def as_completion(record: Completion | Instruction) -> Completion:
    """Return a completion as it is, an instruction in the words that Alpaca was trained with."""
    if isinstance(record, Completion):
        return record
    with_input = ", paired with an input that provides further context" if record.given else ""
    given = f"### Input:\n{record.given}\n\n" if record.given else ""
    prompt = (
        f"Below is an instruction that describes a task{with_input}. Write a response that"
        " appropriately completes the request.\n\n"
        f"### Instruction:\n{record.instruction}\n\n{given}### Response:\n"
    )
    return Completion(prompt, record.answer)


def _window(said: list[bool], longest: int) -> int:
    """Return where to cut from: the start, unless the first answer would be cut off with the end.

    Then half of what is left is the answer's.
    """
    first = said.index(True) if True in said else 0
    if len(said) <= longest or first < longest:
        return 0
    return min(first - longest // 2, len(said) - longest)


def _special(token: int | None) -> list[int]:
    return [] if token is None else [token]
