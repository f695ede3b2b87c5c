"""Runs that measure and keep nothing, what is true of their starts, and whose examples they saw."""

from __future__ import annotations

import math
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorWithPadding

from evatune.errors import ConfigError
from evatune.finetune.fingerprint import fingerprint
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_tree import parse
from evatune.finetune.run import measure, run
from evatune.finetune.start_facts import StartFacts, start_facts
from evatune.finetune.tasks import Task, find_domain
from tests.finetune.helpers import small

torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["eva", "full", "adalora"])
def test_a_measured_run_has_the_figures_of_the_same_run_and_leaves_nothing(
    method: str, bert_folder: Path, tmp_path: Path
) -> None:
    recipe = small(bert_folder, f"method={method}", "data.validation=16")
    found = measure(recipe, tmp_path / "measured", tested=True)
    kept = run(recipe, tmp_path / "kept", quiet=True)
    assert found["test"] == kept["measures"] | {
        "score": kept["score"],
        "loss": kept["eval_loss"],
    }
    assert found["validation"] == kept["validation"]
    assert [step for step, _, _ in found["curve"]] == [0, 3, 6]
    assert found["curve"][-1][1:] == [found["validation"]["loss"], found["validation"]["score"]]
    assert found["validation"]["loss"] != found["test"]["loss"]
    assert found["parameters"] == kept["trainable_parameters"]
    assert (found["kappa"] is None) == (found["participation"] is None) == (method != "eva")
    left = [path.name for path in (tmp_path / "measured").rglob("*") if path.is_file()]
    assert left == ["metrics.jsonl"]


def test_a_further_split_may_have_the_name_of_validation_at_trainer(
    bert_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"w{i} w2", "label": i % 2} for i in range(64)]
    turned = [row | {"label": 1 - int(row["label"])} for row in rows[48:]]
    parts = {"train": rows[:48], "test": rows[48:], "eval": turned}
    splits = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "mine")
    data = [f"data.source={tmp_path / 'mine'}", "data.test_split=test", "data.test=16"]
    parts_wanted = ["data.train=32", "data.validation=16", "data.more_test_splits=[eval]"]
    recipe = small(bert_folder, "method=lora", "task=mine", *data, *parts_wanted)
    found = measure(recipe, tmp_path / "measured", tested=True)
    assert found["test"]["eval_score"] == pytest.approx(1 - found["test"]["score"])
    assert found["curve"][-1][1:] == [found["validation"]["loss"], found["validation"]["score"]]


def test_without_a_test_validation_is_measured_at_both_ends_alone(
    llama_folder: Path, tmp_path: Path
) -> None:
    # Without dropout, whose draws an evaluation between would shift.
    recipe = small(llama_folder, "method=lora", "data.validation=16")
    found = measure(recipe, tmp_path / "tuned", tested=False)
    tested = measure(recipe, tmp_path / "tested", tested=True)
    assert found["test"] is None
    assert found["ranks"] is None
    assert found["validation"] == tested["validation"]
    assert found["curve"] == [tested["curve"][0], tested["curve"][-1]]
    assert len(tested["curve"]) > 2


def test_no_rate_can_be_chosen_by_test_examples(bert_folder: Path, tmp_path: Path) -> None:
    recipe = small(bert_folder, "method=lora", "data.validation=0", "training.steps=1")
    with pytest.raises(ConfigError, match=r"no examples to validate on; set data\.validation"):
        measure(recipe, tmp_path, tested=False)


class Linear(nn.Module):
    """One layer, which sees rows of ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def facts_of(a: torch.Tensor, alpha: float, recipe: Recipe) -> tuple[float | None, float | None]:
    rank, width = a.shape
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
    model = get_peft_model(Linear(width), config)
    model.base_model.model.layer.lora_A["default"].weight.data.copy_(a)
    examples = [torch.eye(width)[index] for index in range(width)]
    task = Task(
        models=find_domain("rl").models,
        model=model,
        train=examples,
        validation=None,
        test=examples,
        collator=lambda rows: {"x": torch.stack(rows)},
        head=[],
    )
    facts = start_facts(model, task, recipe)
    return facts.kappa, facts.participation


def test_kappa_is_one_for_rows_of_pefts_length_and_counts_scale_and_length() -> None:
    recipe = parse({"task": "bbc", "adapter": {"rank": 2, "alpha": 4}})
    width = 8
    usual = torch.eye(width)[:2] / math.sqrt(3)  # of the length of PEFT's rows
    # The inputs are white: every direction of length 1/√3 holds what PEFT's hold on average.
    assert facts_of(usual, 4, recipe) == (pytest.approx(1), pytest.approx(width))
    assert facts_of(10 * usual, 4, recipe)[0] == pytest.approx(10)
    assert facts_of(usual, 12, recipe)[0] == pytest.approx(3)


def test_of_a_long_example_rows_all_over_it_count(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse({"task": "bbc", "adapter": {"rank": 2, "alpha": 4}})
    usual = torch.eye(8)[:2] / math.sqrt(3)
    monkeypatch.setattr(Linear, "forward", lambda self, x: self.layer(x.repeat_interleave(400, 0)))
    assert facts_of(usual, 4, recipe) == (pytest.approx(1), pytest.approx(8))


def test_a_model_without_an_adapter_has_no_such_facts(bert_folder: Path) -> None:
    recipe = small(bert_folder)
    model = Linear(4)
    collator = DataCollatorWithPadding(None)
    task = Task(
        models=find_domain("rl").models,
        model=model,
        train=[],
        validation=None,
        test=[],
        collator=collator,
        head=[],
    )
    assert start_facts(model, task, recipe) == StartFacts(None, None, None)


def test_a_fingerprint_heeds_examples_and_weights_and_nothing_else(bert_folder: Path) -> None:
    first = fingerprint(small(bert_folder))
    assert len(first) == 16
    same = ["method=lora", "seed=5", "training.learning_rate=1", "adapter.rank=2"]
    assert fingerprint(small(bert_folder, *same)) == first
    for other in ("data.train=40", "data.validation=8", "data.test=20", "task=movie"):
        assert fingerprint(small(bert_folder, other)) != first
