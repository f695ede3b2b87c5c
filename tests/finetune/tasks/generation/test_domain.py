"""Language generation: what is learned, and how it is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evatune.errors import ConfigError, DataError
from evatune.finetune.metrics import read_metrics
from evatune.finetune.run import run
from evatune.finetune.tasks import generation
from evatune.loading.assets import asset
from tests.finetune.helpers import small_generation as small

torch.set_num_threads(1)


@pytest.mark.parametrize("task", generation.TASKS)
def test_every_task_trains_and_is_judged(task: str, tmp_path: Path) -> None:
    result = run(small(task, "method=eva"), tmp_path / "run", quiet=True)
    assert 0 <= result["score"] <= 1
    assert result["measures"].keys() == {"perplexity", "exact_match"}
    first, last = (line for line in read_metrics(tmp_path / "run") if "eval_loss" in line)
    assert last["eval_loss"] < first["eval_loss"]


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
        recipe = small("reviews", f"method={method}", "adapter.scale=paper")
        result = run(recipe, tmp_path / method, quiet=True)
        norms[method] = result["first_gradient_b"]
    # whose unit rows are √3 times as long
    assert norms["eva-rho1"] > 3**0.5 * norms["lora-orthogonal"]


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
            "task is 'poems'; tasks of language generation are arithmetic, dates, numbers, clock",
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


@pytest.mark.parametrize("trained", ["method=head", "adapter.bias=all"])
def test_weights_that_are_trained_themselves_are_not_of_16_bits(trained: str) -> None:
    recipe = small("clock", "training.precision=bf16", trained)
    assert generation.prepare(recipe).model.dtype == torch.float32


@pytest.mark.parametrize(("method", "dtype"), [("eva", torch.bfloat16), ("full", torch.float32)])
def test_mixed_precision_holds_frozen_weights_alone_in_16_bits(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    # a CPU takes 16 bits for many times as long
    short = ["data.test=8", "data.max_length=16", "training.batch_size=4"]
    precision = ["training.precision=bf16", "training.learning_rate=1e-3"]
    recipe = small("reviews", f"method={method}", *short, *precision)
    assert generation.prepare(recipe).model.dtype == dtype
    run(recipe, tmp_path / "run", quiet=True)
    first, last = (
        line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line
    )
    assert last < first
