"""Language understanding: a class for a text, and accuracy."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import transformers

from evatune.errors import ConfigError
from evatune.recipes import Recipe
from evatune.tasks.corpora import SENTIMENT, bbc, sentiment
from evatune.tasks.task import Task
from evatune.tasks.text import demo_model, reading, require_path

TASKS = (*SENTIMENT, "bbc")


def prepare(recipe: Recipe) -> Task:
    """Load everything a run needs. The split depends on the sizes alone, not on the run's seed.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where data cannot be had.
    """
    task, data = recipe.task, recipe.data
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}; tasks of language understanding are {', '.join(TASKS)}")
    texts, labels = bbc() if task == "bbc" else sentiment(task)
    if data.train + data.test > len(texts):
        raise ConfigError(
            f"data.train + data.test is {data.train + data.test}, but task {task!r} has {len(texts)} examples; lower them"
        )
    order = np.random.default_rng(0).permutation(len(texts))[: data.train + data.test].tolist()
    source = demo_model() if recipe.model == "demo" else recipe.model
    require_path(source, "model")
    with reading(source, "a model and tokenizer", "a local folder with config.json, weights and tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(set(labels)))
    encoded = tokenizer([texts[i] for i in order], truncation=True, max_length=data.max_length)
    examples = datasets.Dataset.from_dict({**encoded, "labels": [labels[i] for i in order]})
    tests = range(data.train, data.train + data.test)
    return Task(
        model=model,
        train=examples.select(range(data.train)),
        # By length, so that little of a batch is padding; the metric does not see the order.
        test=examples.select(sorted(tests, key=lambda i: len(encoded["input_ids"][i]))),
        collator=transformers.DataCollatorWithPadding(tokenizer),
        metric=accuracy,
        head=["classifier"],
        new_head=True,
        task_type="SEQ_CLS",
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of the examples whose class is the most likely one."""
    return {"score": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
