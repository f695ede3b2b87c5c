"""Mathematics on a stand-in: the sets' columns, a tiny Llama, and answers of several forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import load
from evatune.finetune.run import run
from evatune.finetune.tasks.generation import mathematics
from tests.finetune.paper_data import save_mathematics, save_split


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mathematics(tmp_path_factory.mktemp("sets"))


def recipe(copies: Path, *more: str) -> Recipe:
    return load("paper-metamath", [f"data.source={copies}", "data.validation=4", *more])


def test_problems_are_asked_in_the_words_of_training(copies: Path) -> None:
    found = mathematics.mathematics(recipe(copies).data)
    assert (len(found.train), len(found.validation)) == (20, 4)
    assert {name: len(problems) for name, problems in found.tests.items()} == {
        "gsm8k": 4,
        "math": 7,
    }
    problem = found.tests["gsm8k"][3]
    assert problem.answer == "3"
    assert problem.prompt in {pair.prompt for pair in [*found.train, *found.validation]}
    assert found.tests["math"][0].answer == "\\boxed{\\frac{1}{2}}$."


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("She has 2 + 2 = 4. The answer is: 4", "4", True),
        ("The answer is: $1,000.00", "1000", True),
        ("The answer is: 3. The answer is: 5", "5", True),
        ("We get $x=\\frac12$. The answer is: 0.5", "\\boxed{\\frac{1}{2}}", True),
        ("The answer is: (1,2]", "\\boxed{(1,2]}", True),
        ("so it is $\\boxed{7}$", "7", True),
        ("The answer is: \\sqrt{5}", "\\boxed{\\sqrt{5}}", True),
        ("The answer is: \\dfrac{9}{7}.", "\\boxed{\\frac97}", True),
        ("The answer is: [2,\\infty)", "\\boxed{[2,\\infty)}", True),
        ("The answer is: \\text{east}", "\\boxed{\\text{east}}", True),
        ("The answer is: \\(3\\)", "3", True),
        ("The answer is: 3. \n\nQuestion 2", "3", True),
        ("The answer is: \\sqrt{3}", "\\boxed{\\sqrt{2}}", False),
        ("The answer is: \\text{east}", "\\boxed{\\text{west}}", False),
        ("The answer is: 5", "4", False),
        ("no idea", "4", False),
        ("", "4", False),
    ],
)
def test_an_answer_is_right_if_it_is_equal_as_mathematics_is(
    text: str, answer: str, right: bool
) -> None:
    assert mathematics.is_right(text, answer) == right


# PEFT's word on lm_head, which the paper adapts.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_tiny_llama_learns_them_and_its_answers_are_kept(
    copies: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mathematics, "NEW_TOKENS", 4)
    sizes = ["training.steps=2", "training.eval_every=2", "training.precision=float32"]
    settings = [f"model={llama_folder}", "adapter.rank=2", "adapter.alpha=1", *sizes]
    result = run(recipe(copies, *settings), tmp_path / "run", quiet=True)
    assert (result["score"], result["measures"]["gsm8k"], result["scored"]) == (0, 0, 11)
    lines = (tmp_path / "run" / "answers-gsm8k.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["0", "1", "2", "3"]


def test_rows_without_an_answer_and_sizes_beyond_the_data_are_refused(
    copies: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'mathematics-hub' has 24 questions to train on"):
        mathematics.mathematics(recipe(copies, "data.validation=24").data)
    save_split(
        tmp_path / "meta-math" / "MetaMathQA", "train", [{"query": "w1", "response": "w2"}] * 9
    )
    save_split(tmp_path / "openai" / "gsm8k", "test", [{"question": "w1", "answer": "w2"}])
    with pytest.raises(DataError, match=r"row 0 of .*gsm8k.* is no question with its right answer"):
        mathematics.mathematics(recipe(tmp_path).data)
