"""HumanEval and MBPP: what is asked, and which part of an answer is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evatune.errors import DataError
from evatune.finetune.evaluation import code_sets
from evatune.finetune.evaluation.code_sets import read_problems, share_passed
from tests.conftest import tiny_tokenizer
from tests.finetune.paper_data import save_rows

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_HELPER = 'def half(x):\n    return x / 2\n\ndef third(x):\n    """Return x / 3."""\n'


def humaneval(prompt: str, name: str, claim: str) -> dict[str, str]:
    test = f"def check(candidate):\n    assert candidate{claim}\n"
    return {"task_id": "HumanEval/0", "prompt": prompt, "entry_point": name, "test": test}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    problems = [
        humaneval('import math\ndef one():\n    """Return 1."""\n', "one", "() == 1"),
        humaneval(WITH_HELPER, "third", "(half(6)) == 1"),
    ]
    save_rows(folder / "openai" / "openai_humaneval", {"test": problems})
    row = {
        "task_id": 11,
        "text": "Write a function that adds one.",
        "code": "",
        "test_setup_code": "start = 1",
        "test_list": ["assert add(start) == 2"],
        "challenge_test_list": ["assert add(start) == 3"],
    }
    save_rows(folder / "google-research-datasets" / "mbpp" / "full", {"test": [row]})
    return folder


class Passed:
    """Measures answers that are given, in place of a model's."""

    def __init__(self, copies: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies, self.file, self.monkeypatch = copies, folder / "answers.jsonl", monkeypatch
        self.ends: tuple[str, ...] = ()

    def __call__(self, name: str, *texts: str, template: str | None = None) -> list[bool]:
        def written(model: Any, tokenizer: Any, prompts: Any, count: int, ends: Any) -> list[str]:
            self.ends = ends
            return list(texts)

        self.monkeypatch.setattr(code_sets, "written", written)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        problems = read_problems(name, str(self.copies), None)
        found = share_passed(None, tokenizer, name, problems, 8, self.file)
        lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        ends = [line["outcome"] == "passed" for line in lines]
        assert found["score"] == sum(ends) / len(ends)
        return ends


@pytest.fixture
def passed(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Passed:
    return Passed(copies, tmp_path, monkeypatch)


def test_a_model_goes_on_with_a_file_until_something_else_begins(passed: Passed) -> None:
    right = "\n    return math.floor(1.5)\n\ndef other(:\n"
    assert passed("humaneval", right, "\n    return half(x)") == [True, False]
    assert "\ndef " in passed.ends
    assert passed("mbpp", "\ndef two(): return 2\ndef add(x): return x + 1\nprint(") == [True]
    assert passed("mbpp", "\nimport sys; sys.exit(0)") == [False]


def test_a_chat_is_asked_for_a_block_and_its_first_one_is_run(passed: Passed) -> None:
    whole = "Here it is:\n```python\ndef one():\n    return 1\n```\nand\n```\nno code\n```"
    rest = "```\n    return x / 3\n```"
    assert passed("humaneval", whole, rest, template=TEMPLATE) == [True, True]
    assert passed.ends == ("<end>",)
    listed = "1. Here:\n   ```python\n   def add(x):\n       return x + 1\n   ```"
    thought = "<think>```\nno code\n```</think>```\ndef add(x): return x + 1\n```"
    assert passed("mbpp", listed, template=TEMPLATE) == [True]
    assert passed("mbpp", thought, template=TEMPLATE) == [True]
    cut = "```python\ndef add(x):\n    return x + 1"
    assert passed("mbpp", cut, template=TEMPLATE) == [True]
    assert passed("mbpp", "I do not know", template=TEMPLATE) == [False]


def test_a_chat_is_asked_in_its_form(copies: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (problem,) = read_problems("mbpp", str(copies), None)
    text = code_sets._Chat(tokenizer)._rendered(problem.asked, add_generation_prompt=True)
    assert text.startswith("<user>Write a function that adds one.")
    assert text.endswith("```python\nassert add(start) == 2\n```<end><assistant>")


def test_rows_that_are_no_problems_are_refused(tmp_path: Path) -> None:
    save_rows(tmp_path / "openai" / "openai_humaneval", {"test": [{"prompt": "def f():"}]})
    with pytest.raises(DataError, match=r"row 0 of .* is no question"):
        read_problems("humaneval", str(tmp_path), None)
    with pytest.raises(DataError, match="there is no folder"):
        read_problems("mbpp", str(tmp_path), None)
