"""HumanEval and MBPP: problems that a model solves by a program, which is run against tests.

One program a problem, by greedy decoding. A tokenizer with a chat template is asked in its form,
and the first block of code of the answer counts; else the model goes on with a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatune.finetune.evaluation.programs import PASSED, outcome
from evatune.finetune.recipe import DataOptions
from evatune.finetune.tasks.generation.hub_sets import read_rows
from evatune.finetune.tasks.generation.writing import prompt_tokens, written
from evatune.utils.atomic import atomic_file

NEW_TOKENS = 512
"""Of an answer, at most."""
METRIC = "pass@1"
_BLOCK = re.compile(r"^([ \t]*)```[^\n]*\n(.*?)(?:\n\s*```|\Z)", re.DOTALL | re.MULTILINE)
_THOUGHT = "</think>"
# What begins something else than what was asked for, where a model goes on with a file.
_ENDS = ("\nif ", "\nprint(", "\nassert ", '\n"""', "\n```")
_ENDS_OF_FUNCTION = (*_ENDS, "\ndef ", "\nclass ", "\n#", "\n@")
_SAID = "the answer"


@dataclass(frozen=True)
class Problem:
    """A program to be written.

    Attributes:
        asked: what a chat is asked. begun: the start of a file, which a model goes on with.
        before, after: what stands around the code in the program: setup, and tests.
    """

    asked: str
    begun: str
    before: str
    after: str


@dataclass(frozen=True)
class CodeSet:
    """A data set of the hub whose split `test` holds problems.

    Attributes:
        problem: a row → what is asked. ends: of a file that a model goes on with.
    """

    source: str
    subset: str | None
    problem: Callable[[Any], Problem]
    ends: tuple[str, ...]


def _humaneval(row: Any) -> Problem:
    begun = row["prompt"].rstrip()
    asked = f"Complete this function. Answer with one block of Python code.\n\n{_block(begun)}"
    # A head with a docstring is a function already, which code may go on with or define again.
    return Problem(asked, begun, begun, f"{row['test']}\ncheck({row['entry_point']})")


def _mbpp(row: Any) -> Problem:
    text, tests = row["text"], "\n".join(row["test_list"])
    wanted = "Answer with one block of Python code, which passes these tests."
    begun = f'"""\n{text}\n{tests}\n"""'
    return Problem(f"{text} {wanted}\n\n{_block(tests)}", begun, row["test_setup_code"], tests)


def _block(code: str) -> str:
    return f"```python\n{code}\n```"


CODE_SETS = {
    "humaneval": CodeSet("openai/openai_humaneval", None, _humaneval, _ENDS_OF_FUNCTION),
    "mbpp": CodeSet("google-research-datasets/mbpp", "full", _mbpp, _ENDS),
}
"""Name → a set."""


def read_problems(name: str, source: str, limit: int | None) -> list[Problem]:
    """Return the first problems of a set.

    Args:
        source: "hub", or a folder with copies, see `read_rows`. limit: how many; None is all.

    Raises DataError for a set that cannot be had, or a row that is no problem.
    """
    code_set = CODE_SETS[name]
    data = DataOptions(source=source)
    return read_rows(data, code_set.source, code_set.subset, "test", code_set.problem)[:limit]


def share_passed(
    model: Any, tokenizer: Any, name: str, problems: Sequence[Problem], size: int, file: Path
) -> dict[str, float | None]:
    """Return the share of problems that a model solves, with its standard error.

    Args:
        size: problems at once. file: of JSON lines, with written, program and outcome.
    """
    passed = 0
    form = _Chat(tokenizer) if tokenizer.chat_template else _File(tokenizer, CODE_SETS[name].ends)
    with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for start in range(0, len(problems), size):
            chunk = problems[start : start + size]
            prompts = [form.tokens(problem) for problem in chunk]
            texts = written(model, tokenizer, prompts, NEW_TOKENS, form.ends)
            for problem, text in zip(chunk, texts, strict=True):
                program = f"{problem.before}{form.code(text)}\n{problem.after}\n"
                how = outcome(program)
                passed += how == PASSED
                fields = {"written": text, "program": program, "outcome": how}
                lines.write(json.dumps(fields) + "\n")
    count, share = len(problems), passed / len(problems)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return {"score": share, "standard_error": error}


@dataclass(frozen=True)
class _File:
    """A model goes on with a file, until something else begins."""

    tokenizer: Any
    ends: tuple[str, ...]

    def tokens(self, problem: Problem) -> list[int]:
        return prompt_tokens(self.tokenizer, problem.begun)

    def code(self, text: str) -> str:
        positions = [text.find(end) for end in self.ends if end in text]
        return text[: min(positions, default=len(text))]


@dataclass(frozen=True)
class _Chat:
    """A model is asked in a chat, and answers until the end of its turn."""

    tokenizer: Any

    def tokens(self, problem: Problem) -> list[int]:
        text = self._rendered(problem.asked, add_generation_prompt=True)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    @property
    def ends(self) -> tuple[str, ...]:
        said = self._rendered("", {"role": "assistant", "content": _SAID})
        end = said.rpartition(_SAID)[2].strip()
        return (end,) if end else ()

    def code(self, text: str) -> str:
        answer = text.rpartition(_THOUGHT)[2]
        block = _BLOCK.search(answer)
        if block is None:
            return "\n" + answer
        indent, code = block.groups()  # of a block in a list
        return "\n" + re.sub(f"^{indent}", "", code, flags=re.MULTILINE)

    def _rendered(self, asked: str, *more: dict[str, str], **options: Any) -> str:
        messages = [{"role": "user", "content": asked}, *more]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
