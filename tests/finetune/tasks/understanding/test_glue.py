"""GLUE on stand-ins: RoBERTa's and DeBERTa's classes, and data with GLUE's columns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import f1_score, matthews_corrcoef

from evatune.errors import ConfigError, DataError
from evatune.finetune.check.stand_in import shrunk
from evatune.finetune.recipe import Recipe, load, ours
from evatune.finetune.run import run
from evatune.finetune.tasks.understanding import domain as understanding
from evatune.finetune.tasks.understanding.scoring import class_measures, number_measures
from tests.conftest import save_model, tiny_tokenizer

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
    config = transformers.RobertaConfig(
        vocab_size=60,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=66,
        pad_token_id=tiny_tokenizer().pad_token_id,
    )
    torch.manual_seed(0)
    return save_model(
        transformers.RobertaModel(shrunk(config)), tmp_path_factory.mktemp("models") / "roberta"
    )


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like DeBERTa-v3: disentangled attention, with one set of projections for both."""
    config = transformers.DebertaV2Config(
        vocab_size=60,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        pad_token_id=tiny_tokenizer().pad_token_id,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    torch.manual_seed(0)
    return save_model(
        transformers.DebertaV2Model(shrunk(config)), tmp_path_factory.mktemp("models") / "deberta"
    )


def glue(folder: Path, name: str) -> Path:
    """Data with the columns, splits and label types of one of GLUE's sets."""
    columns = load(f"paper-glue-{name}").data.columns
    classes = {"mnli": 3, "stsb": 0}.get(name, 2)

    def table(count: int) -> datasets.Dataset:
        rows: dict[str, Any] = {
            column: [f"w{n} w{n % 7} w{i}" for n in range(count)]
            for i, column in enumerate(columns)
        }
        labels = [n % (classes or 6) for n in range(count)]
        feature: Any = datasets.Value("float32")
        if classes:
            feature = datasets.ClassLabel(num_classes=classes)
        rows |= {"label": labels, "idx": list(range(count))}
        text = dict.fromkeys(columns, datasets.Value("string"))
        features = datasets.Features(text | {"label": feature, "idx": datasets.Value("int32")})
        return datasets.Dataset.from_dict(rows, features=features)

    tests = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    parts = {"train": table(24), **{test: table(12) for test in tests}}
    datasets.DatasetDict(parts).save_to_disk(folder / name)
    return folder / name


def recipe(name: str, roberta: Path, folder: Path, *more: str) -> Recipe:
    source = glue(folder, name)
    settings = [*SMALL, f"data.source={source}", f"model={roberta}", *more]
    return load(f"paper-glue-{name}", settings)


def test_glue_is_whole() -> None:
    assert {name for name in ours() if name.startswith("paper-glue-")} == {
        f"paper-glue-{task}" for task in TASKS
    }


@pytest.mark.parametrize(
    ("name", "model"), [("cola", "roberta"), ("mnli", "deberta"), ("stsb", "roberta")]
)
def test_a_set_is_trained_and_judged_by_its_own_measures(
    name: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = recipe(name, request.getfixturevalue(model), tmp_path, "adapter.rank=2")
    result = run(settings, tmp_path / "run", quiet=True)
    expected = {
        "cola": ("Matthews' correlation", {"accuracy", "f1"}),
        "mnli": ("accuracy", {"validation_mismatched_score"}),
        "stsb": ("Pearson's correlation", {"spearman"}),
    }[name]
    assert (result["score_name"], set(result["measures"])) == expected


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
