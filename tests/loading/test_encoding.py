"""Tokens and labels of records: of answers, of chats, of instructions."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from evatune.errors import DataError
from evatune.loading.assets import asset
from evatune.loading.encoding import Encoder, encode_answer, has_loss
from evatune.loading.records import Chat, Completion, Instruction, Origin
from tests.conftest import tiny_tokenizer

ORIGIN = Origin("mine.jsonl")
# "w1" before what the user says, "w2" before an answer, "w3" after it.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w1 {{ m['content'] }} {% else %}w2"
    " {{ m['content'] }} w3 {% endif %}{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w1 {{ m['content'] }} {% else %}w2 {%"
    " generation %}{{ m['content'] }} w3 {% endgeneration %}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "w10 w11"},
    {"role": "assistant", "content": "w20"},
    {"role": "user", "content": "w12"},
    {"role": "assistant", "content": "w21 w22"},
]


def encoder(template: str | None = None, longest: int = 32) -> Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, longest, ORIGIN)


def learned(row: dict[str, list[int]]) -> str:
    """The tokens with a label, as words."""
    found: str = tiny_tokenizer().decode([label for label in row["labels"] if label != -100])
    return found


def test_what_is_too_long_loses_the_start_of_the_prompt() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(asset("llama-small"))
    row = encode_answer(tokenizer, "a b c d e f g h i j k l m n o p", " yes", 8)
    answer = [*tokenizer(" yes")["input_ids"], tokenizer.eos_token_id]
    assert len(row["input_ids"]) == 8
    assert row["input_ids"][-len(answer) :] == answer
    assert row["labels"] == [-100] * (8 - len(answer)) + answer


@pytest.mark.parametrize("longest", [1, 2, 3, 8, 64])
def test_a_text_that_is_cut_begins_as_every_text(longest: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(asset("llama-small"))
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    row = encode_answer(tokenizer, "a b c d e f g h i j k l m n o p", " yes", longest)
    assert len(row["input_ids"]) == len(row["labels"]) <= longest
    if longest > 1:
        assert (row["input_ids"][0], row["labels"][0]) == (5, -100)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_of_a_chat_the_answers_alone_are_learned(template: str) -> None:
    row = encoder(template)(Chat(CHAT))
    whole = tiny_tokenizer().decode(row["input_ids"])
    assert whole == "w1 w10 w11 w2 w20 w3 w1 w12 w2 w21 w22 w3"
    assert learned(row) == "w20 w3 w21 w22 w3"
    assert all(
        label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True)
    )


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_answers_in_a_prompt_of_messages_are_not_learned(template: str) -> None:
    assert learned(encoder(template)(Chat(CHAT, given=3))) == "w21 w22 w3"


def test_an_answer_that_the_template_rewrites_later_is_left_out() -> None:
    thoughtful = PLAIN.replace("w2 {{", "w2 {% if loop.last %}w40 {% endif %}{{")
    assert learned(encoder(thoughtful)(Chat(CHAT))) == "w40 w21 w22 w3"


def test_a_question_that_holds_more_than_is_kept_of_it_does_not_hide_the_answer() -> None:
    thinking = PLAIN.replace("prompt %}w2 {%", "prompt %}w2 w41 {%")
    assert learned(encoder(thinking)(Chat(CHAT))) == "w20 w3 w21 w22 w3"


def test_a_template_that_renders_no_chat_by_its_beginning_leaves_all_out() -> None:
    backwards = "{% for m in messages | reverse %}{{ m['content'] }} {% endfor %}"
    assert learned(encoder(backwards)(Chat(CHAT))) == ""


def test_a_chat_that_is_too_long_keeps_an_answer() -> None:
    long = [{"role": "user", "content": " ".join(["w5"] * 40)}, *CHAT[1:2]]
    row = encoder(PLAIN, longest=8)(Chat(long))
    assert len(row["input_ids"]) == 8
    assert learned(row) == "w20 w3"
    assert learned(encoder(PLAIN, longest=6)(Chat(CHAT))) == "w20 w3"


def test_a_chat_that_is_cut_begins_as_every_text() -> None:
    long = [{"role": "user", "content": " ".join(["w5"] * 40)}, *CHAT[1:2]]
    cut = encoder(f"w9 {PLAIN}", longest=8)
    cut.tokenizer.bos_token = "w9"
    row = cut(Chat(long))
    assert (len(row["input_ids"]), learned(row)) == (8, "w20 w3")
    assert (row["input_ids"][0], row["labels"][0]) == (cut.tokenizer.bos_token_id, -100)


def test_instructions_take_the_template_or_alpacas_words() -> None:
    record = Instruction("w10", "w11", "w20")
    assert learned(encoder(PLAIN)(record)) == "w20 w3"
    asked: list[str] = []

    class Heard(transformers.PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            asked.append(text)
            return super().__call__(text, **options)

    tokenizer = Heard(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]")
    Encoder(tokenizer, 32, ORIGIN)(record)
    assert asked == [
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "w10\n\n### Input:\nw11\n\n### Response:\n",
        "w20",
    ]


def test_a_chat_without_a_template_names_the_option() -> None:
    with pytest.raises(DataError, match=r"holds chats.*no chat template; give --chat-"):
        encoder()(Chat(CHAT))


def test_a_template_that_refuses_a_chat_is_quoted() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    for template in (PLAIN + "\n{% if", "{% for m in messages %}"):
        with pytest.raises(DataError, match=r"no whole Jinja \(line \d: .*--chat-template"):
            encoder(template)(Chat(CHAT))
    with pytest.raises(DataError, match=r"refuses a chat of .*\(roles must alternate\)"):
        encoder(strict)(Chat(CHAT))


def test_what_has_nothing_to_learn_is_told() -> None:
    row = encoder(PLAIN)(Chat(CHAT[:1]))
    assert not has_loss(row)
    assert has_loss(encoder()(Completion("", "w1 w2")))


def test_an_answer_after_a_tools_result_in_json_is_learned() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w2 {{ m['content'] }} w3 {% else"
        " %}w1 {{ m['content'] | tojson }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"
    )
    result = {"role": "tool", "content": '{"w10": "w11"}\nw12'}
    question = {"role": "user", "content": "w13"}
    chat = [question, {"role": "assistant", "content": "w20"}, result]
    chat.append({"role": "assistant", "content": "w21"})
    assert learned(encoder(template)(Chat(chat))) == "w20 w3 w21 w3"
