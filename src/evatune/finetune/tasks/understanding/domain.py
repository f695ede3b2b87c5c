"""Language understanding: a class for a text, and accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.base import DataSource, Domain, ModelKind, Task, by_length
from evatune.finetune.tasks.new_modules import new_modules
from evatune.finetune.tasks.pretrained import load_pretrained
from evatune.finetune.tasks.splits import Split, draw_split
from evatune.finetune.tasks.understanding import grammar
from evatune.finetune.tasks.understanding.scoring import (
    OF_NUMBERS,
    class_measures,
    number_measures,
)
from evatune.finetune.tasks.user_data import (
    describe_parts,
    encode_labels,
    label_column,
    label_numbers,
    load_examples,
    more_tests,
    own_origin,
    own_sources,
    require_task,
)
from evatune.loading.assets import asset
from evatune.loading.columns import text_columns
from evatune.loading.corpora import ARCHIVE, SENTIMENT, bbc, sentiment
from evatune.loading.demo import demo_model
from evatune.loading.models import make_ready
from evatune.loading.texts import truncate_texts

TASKS = (*SENTIMENT, "bbc", *grammar.TASKS)
_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1 of the second class",
    "matthews": "Matthews' correlation",
    "pearson": "Pearson's correlation",
    "spearman": "Spearman's correlation",
}
_INSTEAD = (
    "a local folder with config.json, weights and tokenizer, or model=demo as in the recipe"
    " understanding-movie"
)


@dataclass(frozen=True)
class _Labeled:
    """Texts (one each, or a pair) with their classes."""

    texts: list[tuple[str, ...]]
    labels: Sequence[float]  # of classes, whole numbers

    def first(self, max_examples: int | None) -> _Labeled:
        """Return the first texts, or all."""
        return _Labeled(self.texts[:max_examples], self.labels[:max_examples])


def prepare(recipe: Recipe, max_examples: int | None = None) -> Task:
    """Load everything a run needs. The split depends on the sizes alone, not on the run's seed.

    Args:
        max_examples: texts of each part that are encoded, after the labels of all have been looked
            at.

    Raises ConfigError for an unknown task or sizes beyond the data, DataError where data cannot be
    had.
    """
    about, metric = "", recipe.data.metric
    more: dict[str, _Labeled] = {}
    if recipe.data.source is None:
        examples, classes = _bundled_examples(recipe)
    else:
        examples, more, classes, about = _user_examples(recipe)
    if recipe.data.source is None and metric in OF_NUMBERS:
        raise ConfigError(
            f"data.metric is {metric!r}, which is for numbers, and {recipe.task!r} has classes;"
            " choose accuracy"
        )
    if recipe.data.source is None and recipe.data.more_test_splits:
        raise ConfigError(
            f"data.more_test_splits are those of data.source, and {recipe.task!r} has none; leave"
            " them out"
        )
    if metric in ("f1", "matthews") and classes != 2:
        raise ConfigError(
            f"data.metric is {metric!r}, which is for two classes, and these are {classes}; choose"
            " accuracy"
        )
    model, tokenizer, head = _load_model(recipe, classes)
    examples = examples.map(lambda part: part.first(max_examples))
    more = {name: part.first(max_examples) for name, part in more.items()}
    longest = min(recipe.data.max_length, tokenizer.model_max_length)
    encode = partial(_encode, tokenizer=tokenizer, longest=longest)
    return Task(
        models=MODELS,
        model=model,
        train=encode(examples.train),
        validation=by_length(encode(examples.validation)),
        test=by_length(encode(examples.test)),
        collator=transformers.DataCollatorWithPadding(tokenizer),
        metric=partial(number_measures if classes == 1 else class_measures, metric=metric),
        head=head,
        about=about,
        score_name=_NAMES[metric],
        more_tests={name: by_length(encode(part)) for name, part in more.items()},
    )


def _load_model(recipe: Recipe, classes: int) -> tuple[Any, Any, list[str]]:
    """Return a classifier with a new head, its tokenizer, and the names of what is new in it."""
    options: dict[str, Any] = {"num_labels": classes}
    if classes == 1:
        options["problem_type"] = "regression"
    model, tokenizer, missing = load_pretrained(
        MODELS, recipe, "a model and tokenizer", _INSTEAD, **options
    )
    make_ready(model, tokenizer)
    if recipe.model == "demo" and _is_grammar(recipe):
        _add_ends(tokenizer)
    return model, tokenizer, new_modules(model, missing, MODELS.head(model))


def _demo_model(recipe: Recipe) -> Path:
    """Return the small model for a task.

    MiniLM was trained to compare what texts are about and sees little of their grammar.
    """
    return asset("llama-small") if _is_grammar(recipe) else demo_model()


def _is_grammar(recipe: Recipe) -> bool:
    return recipe.data.source is None and recipe.task in grammar.TASKS


def _add_ends(tokenizer: Any) -> None:
    """Put texts between the tokens that the model saw around texts; it is read off the last one."""
    start, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
    )


def _encode(examples: _Labeled, tokenizer: Any, longest: int) -> Any:
    """Return a `datasets.Dataset` of tokens and labels."""
    if not examples.labels:
        return datasets.Dataset.from_dict({})
    columns = zip(*examples.texts, strict=True)
    texts = [truncate_texts(column, tokenizer, longest) for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=longest)
    return datasets.Dataset.from_dict({**encoded, "labels": examples.labels})


def _bundled_examples(recipe: Recipe) -> tuple[Split[_Labeled], int]:
    """Return the examples of one of our tasks, and the number of classes."""
    task = recipe.task
    require_task(task, TASKS, "language understanding")
    if task in grammar.TASKS:
        return _grammar_examples(recipe)
    texts, labels = sentiment(task) if task in SENTIMENT else bbc()
    # Some texts occur twice; one that is tested must not be one that was learned.
    unique = _first_occurrences(texts)
    split = draw_split(len(unique), recipe.data, task)

    def select(indices: list[int]) -> _Labeled:
        chosen = [unique[i] for i in indices]
        return _Labeled([(texts[i],) for i in chosen], [labels[i] for i in chosen])

    return split.map(select), len({labels[i] for i in unique})


def _grammar_examples(recipe: Recipe) -> tuple[Split[_Labeled], int]:
    """Return sentences with and without errors, and the number of classes."""
    data = recipe.data
    parts = _grammar_sentences(recipe.task)

    def first(part: str, count: int) -> _Labeled:
        examples = parts[part]
        if count > len(examples.texts):
            raise ConfigError(
                f"data.{part} is {count}, but task {recipe.task!r} has {len(examples.texts)} such"
                " examples; lower it"
            )
        return _Labeled([(text,) for text in examples.texts[:count]], examples.labels[:count])

    split = Split(
        first("train", data.train),
        first("validation", data.validation),
        first("test", data.test),
    )
    return split, grammar.CLASSES[recipe.task]


@cache
def _grammar_sentences(task: str) -> dict[str, grammar.Sentences]:
    """Return a task's examples by part, which take seconds; a process may make many runs."""
    texts, _ = bbc()
    return grammar.sentences(task, [texts[i] for i in _first_occurrences(texts)])


def _first_occurrences(texts: Sequence[str]) -> list[int]:
    """Return the indices of texts that differ in more than spaces and capitals."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(" ".join(text.split()).lower(), index)
    return sorted(first.values())


def _user_examples(
    recipe: Recipe,
) -> tuple[Split[_Labeled], dict[str, _Labeled], int, str]:
    """Return the examples of `data.source`, those of more tests, the classes, and what they are.

    There is one class where the labels are numbers.
    """
    data = recipe.data
    origin, labeled = own_origin(data), label_column(data)

    def columns(table: Any) -> tuple[str, ...]:
        return text_columns(table, data.columns, origin, data.label_column)

    def with_text(table: Any) -> Any:
        has_text = partial(_has_text, columns=columns(table))
        read = table.select_columns(list({*columns(table), labeled.name}))
        labeled.require_each([row[labeled.name] if has_text(row) else "" for row in read])
        # In memory, eight bytes a row: else a folder that `datasets` saved would get cache files.
        found = table.filter(has_text, keep_in_memory=True)
        if len(found) == 0:
            raise DataError(
                f"{origin.source!r} holds no text: every entry of {', '.join(columns(table))} is"
                " empty; name other columns with data.columns"
            )
        return found

    def texts(table: Any) -> list[tuple[str, ...]]:
        read = [[text or "" for text in table[column]] for column in columns(table)]
        return list(zip(*read, strict=True))

    def content(table: Any) -> Iterable[object]:
        return zip(texts(table), table[data.label_column], strict=True)

    tables = load_examples(recipe, with_text, TASKS, "understanding-movie", content)
    others = more_tests(data, with_text)
    labels: Split[Any]
    if data.metric in OF_NUMBERS:
        labels, classes = tables.map(partial(label_numbers, data=data)), 1
        of_others: dict[str, Any] = {
            name: label_numbers(table, data) for name, table in others.items()
        }
        kinds = "numbers"
    else:
        labels, of_others, classes = encode_labels(tables, data, others)
        kinds = f"{classes} classes"
    examples = Split(
        _Labeled(texts(tables.train), labels.train),
        _Labeled(texts(tables.validation), labels.validation),
        _Labeled(texts(tables.test), labels.test),
    )
    names = ", ".join(columns(tables.train))
    what = f"{origin.source}: {names} with {kinds} in column {data.label_column}"
    more = {name: _Labeled(texts(table), of_others[name]) for name, table in others.items()}
    return examples, more, classes, f"{what}; {describe_parts(tables, data)}"


def _has_text(row: dict[str, Any], columns: Sequence[str]) -> bool:
    """Return whether a row has a text in any of its columns; one without says nothing."""
    return any((row[column] or "").strip() for column in columns)


def _sources(recipe: Recipe) -> list[DataSource]:
    if recipe.data.source is None and recipe.task in SENTIMENT:
        return [DataSource(None, files=(ARCHIVE,))]
    return own_sources(recipe.data)


MODELS = ModelKind(
    loader="AutoModelForSequenceClassification",
    demo=_demo_model,
    head=lambda model: ["classifier" if hasattr(model, "classifier") else "score"],
    new_head=True,
    task_type="SEQ_CLS",
    processor="AutoTokenizer",
)
DOMAIN = Domain("understanding", prepare, MODELS, _sources, version=2)
