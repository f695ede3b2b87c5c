"""Language understanding: a class for a text, and accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import transformers

from evatune.errors import ConfigError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.task import Task
from evatune.loading import user_data as own
from evatune.loading.corpora import SENTIMENT, bbc, sentiment
from evatune.loading.text import demo_model, make_ready, reading, require_path, within_reach

TASKS = (*SENTIMENT, "bbc")


def prepare(recipe: Recipe) -> Task:
    """Load everything a run needs. The split depends on the sizes alone, not on the run's seed.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where data cannot be
    had.
    """
    data = recipe.data
    train, test, classes = _own(recipe) if data.source is not None else _ours(recipe)
    source = demo_model() if recipe.model == "demo" else recipe.model
    require_path(source, "model")
    instead = (
        "a local folder with config.json, weights and tokenizer, or model=demo as in the recipe"
        " understanding-movie"
    )
    with reading(source, "a model and tokenizer", instead):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=recipe.trust_remote_code
        )
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=classes, trust_remote_code=recipe.trust_remote_code
        )

    make_ready(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id

    def encode(part: _Labelled) -> Any:
        longest = min(data.max_length, tokenizer.model_max_length)
        texts = [
            within_reach(column, tokenizer, longest) for column in zip(*part.texts, strict=True)
        ]
        encoded = tokenizer(*texts, truncation=True, max_length=longest)
        return datasets.Dataset.from_dict({**encoded, "labels": part.labels})

    tests = encode(test)
    return Task(
        model=model,
        train=encode(train),
        # By length, so that little of a batch is padding; the metric does not see the order.
        test=tests.select(sorted(range(len(tests)), key=lambda i: len(tests[i]["input_ids"]))),
        collator=transformers.DataCollatorWithPadding(tokenizer),
        metric=accuracy,
        head=["classifier" if hasattr(model, "classifier") else "score"],
        new_head=True,
        task_type="SEQ_CLS",
    )


@dataclass(frozen=True)
class _Labelled:
    texts: list[tuple[str, ...]]  # one or a pair
    labels: list[int]


def _ours(recipe: Recipe) -> tuple[_Labelled, _Labelled, int]:
    task, data = recipe.task, recipe.data
    own.require_task(task, TASKS, "language understanding")
    texts, labels = bbc() if task == "bbc" else sentiment(task)
    # Some texts occur twice; one that is tested must not be one that was learned.
    first = {" ".join(text.split()).lower(): i for i, text in reversed(list(enumerate(texts)))}
    texts, labels = (
        [texts[i] for i in sorted(first.values())],
        [labels[i] for i in sorted(first.values())],
    )
    parts = own.sizes(len(texts), data.train, data.test, task)
    train, test = (
        _Labelled([(texts[i],) for i in part], [labels[i] for i in part]) for part in parts
    )
    return train, test, len(set(labels))


def _own(recipe: Recipe) -> tuple[_Labelled, _Labelled, int]:
    data, columns = recipe.data, recipe.data.columns or ["text"]
    if len(columns) > 2:
        raise ConfigError(
            f"data.columns is {columns}; give one column of text, or two for pairs of texts"
        )
    parts = own.split(recipe, [*columns, data.label_column], TASKS, "understanding-movie")
    first, second, classes = own.labels(*parts, data)
    train, test = (
        _Labelled([tuple(str(row[column]) for column in columns) for row in part], labels)
        for part, labels in zip(parts, (first, second), strict=True)
    )
    return train, test, classes


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of the examples whose class is the most likely one."""
    return {"score": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
