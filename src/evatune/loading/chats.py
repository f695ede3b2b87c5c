"""Chats as tokens: a chat template renders them, and what the assistant says has a loss."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from evatune.errors import DataError
from evatune.loading.hub import reading, require_path
from evatune.loading.records import Chat, Origin
from evatune.schemas.text import read_text
from evatune.utils.extras import extras

with extras(__name__):
    import jinja2

# What templates put around the assistant's words, for trainers that learn no others.
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Spans = list[tuple[int, int]]  # beginnings and ends, in characters
_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")


def load_template(source: str) -> str:
    """Return a chat template: a file's text, or that of a model by hub id or folder.

    Raises DataError where there is none.
    """
    path = Path(source)
    if path.is_file():
        return read_text(path)
    if path.suffix in _SUFFIXES:
        raise DataError(f"chat template {source!r} does not exist; name a Jinja file or a model")
    require_path(source, "chat template")
    with reading(source, "a tokenizer", "a Jinja file"):
        template = transformers.AutoTokenizer.from_pretrained(source).chat_template
    if not isinstance(template, str):
        raise DataError(
            f"the tokenizer of {source!r} has no chat template; name a model made for chats, or a"
            " Jinja file"
        )
    return template


def require_template(tokenizer: Any, origin: Origin) -> None:
    """Raise a DataError for a tokenizer that cannot render chats."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{origin.source!r} holds chats, and the model's tokenizer has no chat template; give"
            f" {origin.template} a Jinja file, or the hub id or folder of a model that has one,"
            " such as the chat version of this one"
        )


def tokens_of(tokenizer: Any, chat: Chat, origin: Origin) -> tuple[list[int], list[bool]]:
    """Return a chat's tokens, and for each whether the assistant says it after `chat.given`.

    A template's own marks ({% generation %}) decide where it has them; else an answer is what the
    rendered chat has beyond the one that stops before it and asks for an answer.

    Raises:
        DataError: the template refuses the chat, or the tokenizer cannot tell where tokens lie.
    """
    require_template(tokenizer, origin)
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say which part of a text a token is, so answers"
            " cannot be told from questions; take a model with a tokenizer.json"
        )
    try:
        marked = bool(_MARKED.search(str(tokenizer.chat_template)))
        text, spans = (_marked if marked else _compared)(tokenizer, chat)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is no whole Jinja (line {error.lineno}: {error.message}); mend it,"
            f" or give another with {origin.template}"
        ) from error
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(
            f"the chat template refuses a chat of {origin.source!r} ({error}); mend the chat, or"
            f" give another template with {origin.template}"
        ) from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # By its last character: a word's token may begin with the space before it.
    ends = [end for _, end in encoded["offset_mapping"]]
    said = [any(start < end <= stop for start, stop in spans) for end in ends]
    return encoded["input_ids"], said


def _marked(tokenizer: Any, chat: Chat) -> tuple[str, Spans]:
    """Return the rendered chat, and where its template marks what the assistant says."""
    texts, spans = render_jinja_template(
        conversations=[chat.messages],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    given = sum(message["role"] == "assistant" for message in chat.messages[: chat.given])
    return texts[0], spans[0][given:]


def _compared(tokenizer: Any, chat: Chat) -> tuple[str, Spans]:
    """Return the rendered chat, and what it has beyond the one before each of its answers.

    Templates may ask for an answer by more than they keep of it, such as the start of a thought,
    and render a message in another way when others follow, such as without its thoughts: what the
    renderings have in common counts, and an answer of which nothing is left does not.
    """
    text, spans = _rendered(tokenizer, chat.messages), []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant" or number < chat.given:
            continue
        before = _rendered(tokenizer, chat.messages[:number], add_generation_prompt=True)
        until = _rendered(tokenizer, chat.messages[: number + 1])
        start, stop = _common(text, before), _common(text, until)
        asked = chat.messages[number - 1]["content"].strip() if number else ""
        if start < stop and _is_in(text[:start], asked):
            spans.append((start, stop))
    return text, spans


def _is_in(text: str, content: str) -> bool:
    """Return whether a message's content is in a text as it is or as JSON, as results of tools."""
    as_json = (json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return content in text or any(form in text for form in as_json)


def _common(text: str, other: str) -> int:
    """Return how many characters two texts have in common from their start."""
    if text.startswith(other):  # quick, and so it is as a rule
        return len(other)
    pairs = zip(text, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    if not messages:
        return ""
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return rendered
