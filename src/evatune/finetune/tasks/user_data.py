"""The user's own data for a recipe: splits, columns and labels of `data.source`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import DataOptions, Recipe
from evatune.finetune.tasks.splits import Split, draw, draw_split
from evatune.loading.data_files import is_saved_by_datasets, read_data_files
from evatune.loading.hub import reading, require_path
from evatune.loading.texts import require_no_chat


def require_task(task: str, tasks: Sequence[str], domain: str) -> None:
    """Raise a ConfigError for a task that the domain does not have."""
    if task not in tasks:
        raise ConfigError(
            f"task is {task!r}; tasks of {domain} are {', '.join(tasks)}, or any other name with"
            " data.source"
        )


def load_examples(
    recipe: Recipe, columns: Sequence[str], tasks: Sequence[str], example: str
) -> Split[Any]:
    """Return as many examples of `data.source` for each part as the recipe says.

    They are drawn with the seed 0; those to validate on come from the split to train on.

    Args:
        columns: that must be there. tasks: names that are taken. example: a recipe that needs no
            network.

    Raises:
        ConfigError: a task's name that has data of its own; sizes beyond the data. DataError:
            nothing can be read there, or a split or column is missing.
    """
    data = recipe.data
    source = str(data.source)
    if recipe.task in tasks:
        raise ConfigError(
            f"task {recipe.task!r} has data of its own; with data.source, give the task another"
            " name"
        )
    require_path(source, "data.source")
    instead = f"a folder or file of such data, or run the recipe {example}, which needs no network"
    with reading(source, "data", instead):
        train = _read_split(data, data.train_split)
        test = train if data.test_split is None else _read_split(data, data.test_split)
    for column in columns:
        for table in (train, test):
            _require_column(table, column, source)
    if test is train:
        return draw_split(len(train), data, recipe.task).map(train.select)
    learned, chosen_by = draw(len(train), recipe.task, train=data.train, validation=data.validation)
    (tested,) = draw(len(test), recipe.task, test=data.test)
    return Split(train.select(learned), train.select(chosen_by), test.select(tested))


def _require_column(table: Any, column: str, source: str) -> None:
    if column not in table.column_names:
        raise DataError(
            f"{source!r} has no column {column!r}; it has {', '.join(table.column_names)}"
        )
    require_no_chat(table, column, source)


def encode_labels(examples: Split[Any], data: DataOptions) -> tuple[Split[list[int]], int]:
    """Return the labels of all parts as numbers, and how many classes there are.

    There are as many classes as the column declares, else as many as occur.
    """
    column = data.label_column
    feature = examples.train.features[column]
    labels = examples.map(lambda table: list(table[column]))
    values = [*labels.train, *labels.validation, *labels.test]
    if all(isinstance(label, str) for label in values):
        numbers = {name: number for number, name in enumerate(sorted(set(values)))}
        labels = labels.map(lambda part: [numbers[label] for label in part])
        values = [numbers[label] for label in values]
    declared = isinstance(feature, datasets.ClassLabel)
    classes: int = feature.num_classes if declared else len(set(values))
    for label in values:
        if not isinstance(label, int) or not 0 <= label < classes:
            raise DataError(
                f"column {column!r} of {str(data.source)!r} holds the label {label!r}; its"
                f" {classes} classes must be names, or numbers from 0 to {classes - 1}; name"
                " another column with data.label_column"
            )
    if classes < 2:
        raise DataError(
            f"column {column!r} of {str(data.source)!r} holds one class only; give at least two"
        )
    return labels, classes


def _read_split(data: DataOptions, split: str) -> Any:
    path = Path(str(data.source))
    if path.is_file() or is_saved_by_datasets(path):
        return read_data_files(path, split)
    if path.is_dir() and any(sign in str(path) for sign in "*?["):
        raise DataError(
            f"folder {str(path)!r} has one of the signs *?[ in its name, which `datasets` reads as"
            " a pattern; rename it"
        )
    splits = datasets.load_dataset(str(data.source), data.subset)
    if split not in splits:
        raise DataError(f"{str(data.source)!r} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]
