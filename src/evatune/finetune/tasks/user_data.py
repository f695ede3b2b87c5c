"""The user's own data for a recipe: splits, columns and labels of `data.source`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, TypeVar

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import OWN_TASK, DataOptions, Recipe
from evatune.finetune.tasks.splits import Split, draw
from evatune.loading.hub import reading, require_path
from evatune.loading.labels import LabelColumn
from evatune.loading.records import Origin
from evatune.loading.tables import load_split

_MOST_HELD_OUT = 500


class _Selectable(Protocol):
    """A table, or records in one."""

    def __len__(self) -> int: ...

    def select(self, indices: Sequence[int]) -> Self: ...


_Examples = TypeVar("_Examples", bound=_Selectable)


def require_task(task: str, tasks: Sequence[str], domain: str) -> None:
    """Raise a ConfigError for a task that the domain does not have."""
    if task == OWN_TASK:
        raise ConfigError(
            "recipes for your own data need them: give data.source=FILE, a folder or a hub id"
        )
    if task not in tasks:
        raise ConfigError(
            f"task is {task!r}; tasks of {domain} are {', '.join(tasks)}, or any other name with"
            " data.source"
        )


def load_examples(
    recipe: Recipe, usable: Callable[[Any], _Examples], tasks: Sequence[str], example: str
) -> Split[_Examples]:
    """Return as many examples of `data.source` for each part as the recipe says.

    They are drawn with the seed 0; those to validate on come from the split to train on. Sizes that
    are left open are a tenth of the data to validate and to test on, at most 500, and the rest to
    train on.

    Args:
        usable: from a table to the examples in it; raises DataError where they cannot be read.
        tasks: names that are taken. example: a recipe that needs no network.

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
    require_path(source, "data.source")
    instead = f"a folder or file of such data, or run the recipe {example}, which needs no network"
    with reading(source, "data", instead):
        table = load_split(source, data.train_split, data.subset)
        tests = data.test_split and load_split(source, data.test_split, data.subset)
    train = usable(table)
    if data.test_split is None:
        data = _sized(data, len(train), len(train))
        sizes = {"train": data.train, "validation": data.validation, "test": data.test}
        return Split(*(train.select(part) for part in draw(len(train), recipe.task, **sizes)))
    test = usable(tests)
    data = _sized(replace(data, test=data.test or _tenth(len(test))), len(train), 0)
    learned, chosen_by = draw(len(train), recipe.task, train=data.train, validation=data.validation)
    (tested,) = draw(len(test), recipe.task, test=data.test)
    return Split(train.select(learned), train.select(chosen_by), test.select(tested))


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


def label_column(data: DataOptions) -> LabelColumn:
    """Return the column with the classes of `data.source`."""
    return LabelColumn(data.label_column, str(data.source), "data.label_column")


def encode_labels(examples: Split[Any], data: DataOptions) -> tuple[Split[list[int]], int]:
    """Return the labels of all parts as numbers, and how many classes there are.

    There are as many classes as the column declares, else as many as occur.
    """
    labels = examples.map(lambda table: list(table[data.label_column]))
    values = [*labels.train, *labels.validation, *labels.test]
    numbers, names = label_column(data).numbers(examples.train, values)
    coming = iter(numbers)
    return labels.map(lambda part: [next(coming) for _ in part]), len(names)


def _sized(data: DataOptions, total: int, with_test: int) -> DataOptions:
    """Return the options with a size in place of each that is left open.

    Args:
        total: examples to draw from. with_test: the same if the test examples are among them, else
            0.
    """
    test = data.test or _tenth(with_test)
    validation = data.validation
    if data.train == 0 and validation == 0:
        validation = _tenth(total)
    train = data.train or total - validation - (test if with_test else 0)
    if train < 1:
        raise DataError(
            f"{str(data.source)!r} has {total} examples; give at least 3: to train on, to validate"
            " and to test"
        )
    return replace(data, train=train, validation=validation, test=test)


def _tenth(total: int) -> int:
    return min(_MOST_HELD_OUT, max(1, total // 10))
