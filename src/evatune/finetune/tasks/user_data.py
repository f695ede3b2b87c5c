"""The user's own data for a recipe: splits, columns and labels of `data.source`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol, Self, TypeVar

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import USER_TASK, DataOptions, Recipe
from evatune.finetune.tasks.base import DataSource
from evatune.finetune.tasks.splits import Split, draw
from evatune.loading.hub import reading, require_path
from evatune.loading.labels import LabelColumn
from evatune.loading.records import Origin
from evatune.loading.tables import load_split
from evatune.utils.warn import warn

MOST_HELD_OUT = 500
"""Examples of a part whose size is left open, at most."""


class _Selectable(Protocol):
    """A table, or records in one."""

    def __len__(self) -> int: ...

    def select(self, indices: Sequence[int]) -> Self: ...


_Examples = TypeVar("_Examples", bound=_Selectable)


def require_task(task: str, tasks: Sequence[str], domain: str) -> None:
    """Raise a ConfigError for a task that the domain does not have."""
    if task == USER_TASK:
        raise ConfigError(
            "recipes for your own data need them: give data.source=FILE, a folder or a hub id"
        )
    if task not in tasks:
        raise ConfigError(
            f"task is {task!r}; tasks of {domain} are {', '.join(tasks)}, or any other name with"
            " data.source"
        )


def load_examples(
    recipe: Recipe,
    usable: Callable[[Any], _Examples],
    tasks: Sequence[str],
    example: str,
    content: Callable[[_Examples], Iterable[object]] | None = None,
) -> Split[_Examples]:
    """Return as many examples of `data.source` for each part as the recipe says.

    They are drawn with the seed 0; those to validate on come from the split to train on. Sizes that
    are left open are a tenth of the data to validate and to test on, at most 500, and the rest to
    train on.

    Args:
        usable: from a table to the examples in it; raises DataError where they cannot be read.
        tasks: names that are taken. example: a recipe that needs no network.
        content: from examples to what each says. Where the test is cut off the data to train on,
            those that say what an earlier one does are left out: what is tested was not trained on.

    Raises:
        ConfigError: a task's name that has data of its own; sizes beyond the data. DataError:
            nothing can be read there, or a split or column is missing.
    """
    data = recipe.data
    source = str(data.source)
    if recipe.task in tasks:
        raise ConfigError(
            f"task {recipe.task!r} has data of its own; with data.source, leave the task out or"
            " give it another name"
        )
    for split in (data.test_split, *data.more_test_splits):
        if split == data.train_split:
            raise ConfigError(
                f"{split!r} is data.train_split and a split to test on, so that what is tested"
                " would have been trained on; leave data.test_split out, which cuts unseen"
                " examples off, or name another split"
            )
    require_path(source, "data.source")
    instead = f"a folder or file of such data, or run the recipe {example}, which needs no network"
    with reading(source, "data", instead):
        table = load_split(source, data.train_split, data.subset)
        tests = data.test_split and load_split(source, data.test_split, data.subset)
    train = usable(table)
    if data.test_split is None:
        if content is not None:
            train = _without_repeats(train, content(train), source)
        data = sized(data, len(train), len(train))
        sizes = {"train": data.train, "validation": data.validation, "test": data.test}
        return Split(*(train.select(part) for part in draw(len(train), recipe.task, **sizes)))
    test = usable(tests)
    data = sized(replace(data, test=data.test or held_out(len(test))), len(train), 0)
    learned, chosen_by = draw(len(train), recipe.task, train=data.train, validation=data.validation)
    (tested,) = draw(len(test), recipe.task, test=data.test)
    return Split(train.select(learned), train.select(chosen_by), test.select(tested))


def _without_repeats(examples: _Examples, contents: Iterable[object], source: str) -> _Examples:
    """Return the examples but those that say what an earlier one does; a warning counts them."""
    first: dict[str, int] = {}
    for index, content in enumerate(contents):
        first.setdefault(repr(content), index)
    repeats = len(examples) - len(first)
    if not repeats:
        return examples
    warn(
        f"{repeats:,} of the {len(examples):,} examples of {source!r} repeat an earlier one and are"
        " left out, so that nothing is tested that was trained on"
    )
    return examples.select(list(first.values()))


def checked(find: Callable[[Any], object]) -> Callable[[Any], Any]:
    """Return the function that returns a table in which `find` finds what it needs, or raises."""

    def usable(table: Any) -> Any:
        find(table)
        return table

    return usable


def describe_parts(split: Split[Any], data: DataOptions) -> str:
    """Return how many examples each part has, as the end of a sentence."""
    validation = f"{len(split.validation):,} for validation, " if len(split.validation) else ""
    cut = "cut off " if data.train == 0 else ""
    return f"{len(split.train):,} to train on, {cut}{validation}{len(split.test):,} for the test"


def own_origin(data: DataOptions) -> Origin:
    """Return where `data.source` is, and which keys of a recipe read it in another way."""
    keys = ("data.columns", "data.chat_template", "data.label_column")
    return Origin(str(data.source), *keys)


def own_sources(data: DataOptions) -> list[DataSource]:
    """Return where `data.source` is; nothing without."""
    return [] if data.source is None else [DataSource(data.source, (data.subset,))]


def label_column(data: DataOptions) -> LabelColumn:
    """Return the column with the classes of `data.source`."""
    return LabelColumn(data.label_column, str(data.source), "data.label_column")


def encode_labels(
    examples: Split[Any], data: DataOptions, more: Mapping[str, Any] | None = None
) -> tuple[Split[list[int]], dict[str, list[int]], int]:
    """Return the labels of all parts as numbers, those of `more` parts, and the number of classes.

    There are as many classes as the column declares, else as many as occur.
    """
    labels = examples.map(lambda table: list(table[data.label_column]))
    others = {name: list(table[data.label_column]) for name, table in (more or {}).items()}
    values = [*labels.train, *labels.validation, *labels.test, *chain(*others.values())]
    numbers, names = label_column(data).numbers(examples.train, values)
    coming = iter(numbers)

    def encoded(part: list[Any]) -> list[int]:
        return [next(coming) for _ in part]

    split = labels.map(encoded)
    return split, {name: encoded(part) for name, part in others.items()}, len(names)


def label_numbers(table: Any, data: DataOptions) -> list[float]:
    """Return the labels as the numbers that they are; DataError for one that is none."""
    values = list(table[data.label_column])
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise DataError(
                f"column {data.label_column!r} of {str(data.source)!r} holds {value!r}, and"
                f" data.metric={data.metric} is for numbers; leave it out for classes, or name"
                " another column with data.label_column"
            )
    return [float(value) for value in values]


def more_tests(data: DataOptions, usable: Callable[[Any], _Examples]) -> dict[str, _Examples]:
    """Return the examples of `data.more_test_splits`; raises what `load_examples` does."""
    source, splits = str(data.source), {}
    for name in data.more_test_splits:
        with reading(source, "data", "other splits, or none with data.more_test_splits=[]"):
            splits[name] = usable(load_split(source, name, data.subset))
    return splits


def sized(data: DataOptions, total: int, with_test: int) -> DataOptions:
    """Return the options with a size in place of each that is left open.

    Args:
        total: examples to draw from. with_test: the same if the test examples are among them, else
            0.

    Raises DataError for data that leave nothing to train on.
    """
    test = data.test or held_out(with_test)
    validation = data.validation
    if data.train == 0 and validation == 0:
        validation = held_out(total)
    train = data.train or total - validation - (test if with_test else 0)
    if train < 1:
        raise DataError(
            f"{str(data.source)!r} has {total} examples; give at least 3: to train on, to validate"
            " and to test"
        )
    return replace(data, train=train, validation=validation, test=test)


def held_out(total: int) -> int:
    """Return how many of the examples validate, or test, where a recipe leaves it open."""
    return min(MOST_HELD_OUT, max(1, total // 10))
