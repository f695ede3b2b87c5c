"""GLUE on stand-ins: RoBERTa's and DeBERTa's classes, and data with GLUE's columns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.recipe_files import bundled_recipes, load
from evatune.finetune.tasks.understanding import domain as understanding
from evatune.finetune.tasks.understanding.scoring import class_measures, number_measures
from tests.finetune.paper_data import save_glue, save_stand_in

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
SMALL = (
    "data.train=16",
    "data.test=8",
    "training.steps=2",
    "training.batch_size=4",
    "training.eval_every=2",
    "training.precision=float32",
)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in("roberta", tmp_path_factory.mktemp("models") / "roberta")


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in("deberta", tmp_path_factory.mktemp("models") / "deberta")


def recipe(name: str, roberta: Path, folder: Path, *more: str) -> Recipe:
    source = save_glue(folder, name)
    settings = [*SMALL, f"data.source={source}", f"model={roberta}", *more]
    return load(f"paper-glue-{name}", settings)


def test_glue_is_whole() -> None:
    assert {name for name in bundled_recipes() if name.startswith("paper-glue-")} == {
        f"paper-glue-{task}" for task in TASKS
    }


def test_what_deberta_has_no_weights_for_is_trained_and_saved(
    deberta: Path, tmp_path: Path
) -> None:
    task = understanding.prepare(recipe("mnli", deberta, tmp_path))
    assert task.head == ["classifier", "pooler"]


@pytest.mark.parametrize("name", ["mrpc", "qnli", "qqp", "rte", "sst2"])
def test_the_other_sets_are_read_with_their_columns(
    name: str, roberta: Path, tmp_path: Path
) -> None:
    task = understanding.prepare(recipe(name, roberta, tmp_path))
    assert (len(task.train), len(task.test)) == (16, 8)
    batch = task.collator([task.train[0], task.train[1]])
    assert torch.isfinite(task.model(**batch).loss)


def test_the_model_of_numbers_minimizes_their_squared_error(roberta: Path, tmp_path: Path) -> None:
    task = understanding.prepare(recipe("stsb", roberta, tmp_path))
    batch = task.collator([task.test[i] for i in range(4)])
    outputs = task.model.eval()(**batch)
    assert outputs.logits.shape == (4, 1)
    assert batch["labels"].dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(
        (outputs.logits[:, 0] - batch["labels"]).square().mean().item()
    )


def test_measures_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(50, 2)), random.integers(0, 2, 50)
    found = class_measures(SimpleNamespace(predictions=logits, label_ids=labels), "matthews")
    chosen = logits.argmax(-1)
    assert found["score"] == pytest.approx(matthews_corrcoef(labels, chosen))
    assert found["f1"] == pytest.approx(f1_score(labels, chosen))
    assert found["accuracy"] == (chosen == labels).mean()
    constant = SimpleNamespace(
        predictions=np.array([[1.0, 0.0]] * 4), label_ids=np.array([0, 1] * 2)
    )
    assert class_measures(constant, "matthews")["score"] == 0
    assert class_measures(constant, "f1")["score"] == 0
    numbers = SimpleNamespace(predictions=np.array([[1.0], [2.0], [4.0]]), label_ids=np.arange(3))
    ranked = number_measures(numbers, "spearman")
    assert ranked["score"] == pytest.approx(1)
    assert 0.9 < ranked["pearson"] < 1


@pytest.mark.parametrize(
    ("name", "more", "error", "text"),
    [
        ("mnli", ["data.metric=matthews"], ConfigError, "for two classes, and these are 3"),
        ("cola", ["data.metric=auc"], ConfigError, "data.metric is 'auc'"),
        (
            "cola",
            ["data.metric=pearson", "data.label_column=sentence"],
            DataError,
            "is for numbers",
        ),
        ("cola", ["data.more_test_splits=[other]"], DataError, "has no split 'other'"),
        ("cola", ["domain=images"], ConfigError, "data.metric is for the domain understanding"),
        ("stsb", ["data.metric=accuracy"], DataError, "classes must be names, or numbers"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(
    name: str, more: list[str], error: type[Exception], text: str, roberta: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        understanding.prepare(recipe(name, roberta, tmp_path, *more))


def test_classes_of_ours_are_no_numbers() -> None:
    with pytest.raises(ConfigError, match="is for numbers, and 'bbc' has classes"):
        understanding.prepare(load("understanding-bbc", ["data.metric=pearson"]))
    with pytest.raises(ConfigError, match=r"are those of data\.source, and 'bbc' has none"):
        understanding.prepare(load("understanding-bbc", ["data.more_test_splits=[other]"]))
