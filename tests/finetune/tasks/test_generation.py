"""Language generation: what is learned, and how it is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from evatune.finetune.tasks.language import Pair

from evatune.errors import ConfigError, DataError
from evatune.finetune.metrics import read_metrics
from evatune.finetune.recipe import Recipe, load
from evatune.finetune.run import run
from evatune.finetune.tasks import generation, language
from evatune.loading.assets import asset

torch.set_num_threads(1)

SMOKE = [
    "data.train=64",
    "data.test=20",
    "training.steps=4",
    "training.eval_every=4",
    "training.log_every=1",
]


def small(task: str, *more: str) -> Recipe:
    return load(f"generation-{task}", [*SMOKE, *more])


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    folder = asset("llama-small")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("task", generation.TASKS)
def test_every_task_trains_and_is_judged(task: str, tmp_path: Path) -> None:
    result = run(small(task, "method=eva"), tmp_path / "run", quiet=True)
    assert 0 <= result["score"] <= 1
    assert result["measures"].keys() == {"perplexity", "exact_match"}
    first, last = (line for line in read_metrics(tmp_path / "run") if "eval_loss" in line)
    assert last["eval_loss"] < first["eval_loss"]


@pytest.mark.parametrize("task", language.TASKS)
def test_no_prompt_that_is_tested_was_learned_from(task: str) -> None:
    pairs = language.TASKS[task](800, 150)
    assert (len(pairs.train), len(pairs.test)) == (800, 150)
    parts = [{pair.prompt or pair.answer for pair in part} for part in (pairs.train, pairs.test)]
    assert not parts[0] & parts[1]
    assert pairs == language.TASKS[task](800, 150)


def test_worked_solutions_are_right() -> None:
    for pair in language.arithmetic(500, 0).train:
        left, right = pair.answer.split(" = ")
        assert eval(left) == int(right)  # the task's own sums
        assert language.final_answer(pair.answer) == right


def test_a_question_has_its_answer_among_four_different_choices() -> None:
    for pair in language.commonsense(1000, 200).test:
        assert len(set(pair.choices)) == 4
        assert pair.answer in pair.choices


def test_code_of_one_module_is_in_one_part() -> None:
    modules = [module for module in language._functions() if not language.held_out(module)]
    assert modules == []


def test_eva_starts_from_the_loss_of_lora(tmp_path: Path) -> None:
    losses = []
    for method in ("lora", "eva", "untouched"):
        run(small("reviews", f"method={method}"), tmp_path / method, quiet=True)
        losses.append(
            next(
                line["eval_loss"] for line in read_metrics(tmp_path / method) if "eval_loss" in line
            )
        )
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-5)


def test_a_budget_in_parameters_keeps_eva_within_those_of_lora(tmp_path: Path) -> None:
    count = {}
    for method in ("lora", "eva"):
        recipe = small(
            "reviews",
            f"method={method}",
            "adapter.budget=parameters",
            "training.steps=1",
            "training.eval_every=1",
        )
        count[method] = run(recipe, tmp_path / method, quiet=True)["trainable_parameters"]
    assert 0.95 * count["lora"] < count["eva"] <= count["lora"]


def test_the_gradient_of_b_is_larger_for_eva_than_for_orthonormal_rows(tmp_path: Path) -> None:
    norms = {}
    for method in ("lora-orthogonal", "eva-rho1"):
        result = run(small("reviews", f"method={method}"), tmp_path / method, quiet=True)
        norms[method] = result["first_gradient_b"]
    assert norms["eva-rho1"] > norms["lora-orthogonal"]


def test_the_measures_are_those_of_the_definition(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    pairs = [Pair("2 + 2 =", " 4"), Pair("", "import os"), Pair("x", " y z w")]
    rows = [generation._encode(tokenizer, pair, 32) for pair in pairs]
    batch = transformers.DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    reduced = generation._per_token(logits, batch["labels"])
    found = generation.measures(
        transformers.EvalPrediction(reduced.numpy(), batch["labels"].numpy())
    )
    losses = []
    for row in rows:  # one by one, without padding
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [
            -float(scores[i - 1, label]) for i, label in enumerate(row["labels"]) if label != -100
        ]
    assert math.log(found["perplexity"]) == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_what_is_too_long_loses_the_start_of_the_prompt(llama: tuple[Any, Any]) -> None:
    _, tokenizer = llama
    row = generation._encode(tokenizer, Pair("a b c d e f g h i j k l m n o p", " yes"), 8)
    answer = [*tokenizer(" yes")["input_ids"], tokenizer.eos_token_id]
    assert len(row["input_ids"]) == 8
    assert row["input_ids"][-len(answer) :] == answer
    assert row["labels"] == [-100] * (8 - len(answer)) + answer


class _Parrot:
    """Writes the right solutions in the order of the problems, wrong ones from `good` on."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, pairs: list[Pair], good: int) -> None:
        texts = [pair.answer if i < good else "1 + 1 = 999" for i, pair in enumerate(pairs)]
        self.answers = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")[
            "input_ids"
        ]

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, self.answers], dim=1)


def test_a_solution_counts_by_its_final_number(llama: tuple[Any, Any]) -> None:
    _, tokenizer = llama
    pairs = language.arithmetic(10, 0).train
    assert generation._solved(_Parrot(tokenizer, pairs, 7), tokenizer, pairs) == 0.7


def test_choices_are_weighed_by_their_likelihood(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    choices = (" os", " zqxv zqxv zqxv")
    sure = [Pair("import", answer, choices) for answer in choices]
    assert generation._chosen(model, tokenizer, sure, 32) == 0.5


@pytest.mark.parametrize("columns", [["q", "a"], ["a"]])
def test_data_of_the_user_are_read(columns: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"What is {i}?", "a": f"It is {i}."}) + "\n" for i in range(30))
    )
    recipe = small(
        "code",
        "task=mine",
        f"data.source={path}",
        f"data.columns={columns}",
        "data.train=20",
        "data.test=10",
    )
    task = generation.prepare(recipe)
    assert (len(task.train), len(task.test)) == (20, 10)
    assert all(("What" in text) == (len(columns) == 2) for text in _decoded(task.train))


def _decoded(examples: Any) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(asset("llama-small"))
    texts: list[str] = tokenizer.batch_decode(list(examples["input_ids"]))
    return texts


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (
            ["task=poems"],
            ConfigError,
            "task is 'poems'; tasks of language generation are arithmetic, commonsense",
        ),
        (
            ["data.train=99999"],
            ConfigError,
            "data.train is 99999 and data.test 20, but task 'code' has",
        ),
        (["task=code", "data.source=x/y"], ConfigError, "has data of its own; with data.source"),
        (
            ["task=mine", "data.source=./nowhere"],
            DataError,
            "data.source './nowhere' does not exist",
        ),
        (
            ["task=mine", "data.source=x/y", "data.columns=[a,b,c]"],
            ConfigError,
            "give the prompt's and the answer's column",
        ),
    ],
)
def test_a_mistake_in_the_recipe_says_what_is_allowed(
    overrides: list[str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        generation.prepare(small("code", *overrides))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "x", "a": "y"}\n' * 30)
    recipe = small("code", "task=mine", f"data.source={path}", "data.columns=[q,answer]")
    with pytest.raises(DataError, match="has no column 'answer'; it has q, a"):
        generation.prepare(recipe)


@pytest.mark.parametrize(
    "overrides", [["model=meta-llama/none"], ["task=mine", "data.source=nobody/nothing"]]
)
@pytest.mark.usefixtures("no_network")
def test_without_a_network_a_hub_id_leads_to_what_works_offline(overrides: list[str]) -> None:
    with pytest.raises(DataError, match=r"the model hub cannot be reached.*generation-code"):
        generation.prepare(small("code", *overrides))


def test_the_checkpoint_fits_its_card() -> None:
    import hashlib

    for name in ("llama-small", "vit-glyphs", "dt-metaworld"):
        weights = (asset(name) / "model.safetensors").read_bytes()
        assert len(weights) <= 10_000_000
        assert hashlib.sha256(weights).hexdigest() in (asset(name) / "README.md").read_text(
            encoding="utf-8"
        )


@pytest.mark.parametrize(("method", "dtype"), [("eva", torch.bfloat16), ("full", torch.float32)])
def test_mixed_precision_holds_frozen_weights_alone_in_16_bits(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    recipe = small(
        "reviews", f"method={method}", "training.precision=bf16", "training.learning_rate=1e-3"
    )
    assert generation.prepare(recipe).model.dtype == dtype
    run(recipe, tmp_path / "run", quiet=True)
    first, last = (
        line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line
    )
    assert last < first
