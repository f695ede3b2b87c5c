"""Word problems and competition problems: learned from MetaMathQA, tested on GSM8K and MATH.

A test asks for an answer in the words of training, without examples, by greedy decoding. An answer
counts if it equals the set's own as mathematics does: 1/2 is 0.5.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evatune.finetune.recipe import DataOptions
from evatune.finetune.tasks.generation.base import Pair
from evatune.finetune.tasks.generation.hub_sets import HubSets, drawn_sets, read_rows
from evatune.finetune.tasks.generation.writing import prompt_tokens, written
from evatune.loading.encoding import as_completion
from evatune.loading.records import Instruction
from evatune.utils.atomic import atomic_file
from evatune.utils.extras import extras

TASK = "mathematics-hub"
NEW_TOKENS = 512
"""Of an answer, at most."""
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_LEARNED = ("meta-math/MetaMathQA", None)
_WORD_PROBLEMS = ("openai/gsm8k", "main")
_COMPETITIONS = [("EleutherAI/hendrycks_math", subject) for subject in _SUBJECTS]
SETS = (_LEARNED, _WORD_PROBLEMS, *_COMPETITIONS)
"""Hub id and subset of each set."""
_SAID = "The answer is:"  # as MetaMathQA ends its answers
# What math_verify takes for the beginning of mathematics.
_MARKED = re.compile(r"(?<!\\)\$|\\[(\[]|\\boxed")


def mathematics(data: DataOptions) -> HubSets:
    """Return the problems, as many as `drawn_sets` says; those to test on with the answer alone.

    Args:
        data: its source is "hub", or a folder with copies, see `read_rows`.

    Raises:
        ConfigError: sizes beyond the data. DataError: a set cannot be had, or a row of it has no
            answer.
    """
    learned = read_rows(data, *_LEARNED, "train", _learned)
    tests = {
        "gsm8k": read_rows(data, *_WORD_PROBLEMS, "test", _word_problem),
        "math": [
            problem
            for location in _COMPETITIONS
            for problem in read_rows(data, *location, "test", _competition_problem)
        ],
    }
    return drawn_sets(data, learned, tests, TASK)


def _asked(question: str) -> str:
    return as_completion(Instruction(question, "", "")).prompt


def _learned(row: Any) -> Pair:
    return Pair(_asked(row["query"]), row["response"])


def _word_problem(row: Any) -> Pair:
    return Pair(_asked(row["question"]), row["answer"].split("####")[1].strip())


def _competition_problem(row: Any) -> Pair:
    boxed = row["solution"].rindex("\\boxed")  # raises ValueError where there is none
    return Pair(_asked(row["problem"]), row["solution"][boxed:])


def is_right(text: str, answer: str) -> bool:
    """Return whether what a model wrote ends with the right answer.

    That is what stands behind "The answer is:" in its line, with or without marks of mathematics
    around it, else the last piece of mathematics.
    """
    with extras("the test of mathematics"):
        from math_verify import parse, verify
    said = text
    if _SAID in text:
        said = text.rpartition(_SAID)[2].strip().partition("\n")[0].rstrip(" .")
        said = said if _MARKED.search(said) else f"${said}$"
    return bool(verify(parse(answer), parse(said)))


def share_solved(model: Any, tokenizer: Any, problems: list[Pair], size: int, file: Path) -> float:
    """Return the share of problems that a model solves, and write what it wrote, a line each.

    Args:
        size: problems at once. file: of JSON lines, with prompt, written, answer and right.
    """
    solved = 0
    with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for start in range(0, len(problems), size):
            chunk = problems[start : start + size]
            prompts = [prompt_tokens(tokenizer, problem.prompt) for problem in chunk]
            texts = written(model, tokenizer, prompts, NEW_TOKENS)
            for problem, text in zip(chunk, texts, strict=True):
                right = is_right(text, problem.answer)
                solved += right
                fields = {"prompt": problem.prompt, "written": text}
                lines.write(json.dumps(fields | {"answer": problem.answer, "right": right}) + "\n")
    return solved / len(problems)
