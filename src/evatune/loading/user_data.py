"""The user's own data for a recipe: splits, columns and labels of `data.source`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from evatune.errors import ConfigError, DataError
from evatune.finetune.recipe import DataOptions, Recipe
from evatune.loading.local import read_local
from evatune.loading.text import reading, require_no_chat, require_path


def require_task(task: str, tasks: Sequence[str], domain: str) -> None:
    """Raise a ConfigError for a task that the domain does not have."""
    if task not in tasks:
        raise ConfigError(
            f"task is {task!r}; tasks of {domain} are {', '.join(tasks)}, or any other name with"
            " data.source"
        )


def split(
    recipe: Recipe, columns: Sequence[str], tasks: Sequence[str], example: str
) -> tuple[Any, Any]:
    """Training and test examples of `data.source`, as many as the recipe says, drawn with the seed
    0.

    Args:
        columns: that must be there. tasks: names that are taken. example: a recipe that needs no
            network.

    Raises:
        ConfigError: a task's name that has data of its own; sizes beyond the data. DataError:
            nothing can be read there, or a split or column is missing.
    """
    data, source = recipe.data, str(recipe.data.source)
    if recipe.task in tasks:
        raise ConfigError(
            f"task {recipe.task!r} has data of its own; with data.source, give the task another"
            " name"
        )
    require_path(source, "data.source")
    with reading(
        source,
        "data",
        f"a folder or file of such data, or run the recipe {example}, which needs no network",
    ):
        train = _read(data, data.train_split)
        test = train if data.test_split is None else _read(data, data.test_split)
    for column in columns:
        for table in (train, test):
            if column not in table.column_names:
                raise DataError(
                    f"{source!r} has no column {column!r}; it has {', '.join(table.column_names)}"
                )
            require_no_chat(table, column, source)
    if test is train:
        return _draw(train, data.train, data.test, recipe.task)
    return _draw(train, data.train, 0, recipe.task)[0], _draw(test, data.test, 0, recipe.task)[0]


def labels(train: Any, test: Any, data: DataOptions) -> tuple[list[int], list[int], int]:
    """Labels as numbers, and how many classes there are: as the column declares them, else as many
    as occur."""
    column, feature = data.label_column, train.features[data.label_column]
    parts = [list(train[column]), list(test[column])]
    if all(isinstance(label, str) for part in parts for label in part):
        names = {
            name: i for i, name in enumerate(sorted({label for part in parts for label in part}))
        }
        parts = [[names[label] for label in part] for part in parts]
    declared = isinstance(feature, datasets.ClassLabel)
    classes: int = (
        feature.num_classes if declared else len({label for part in parts for label in part})
    )
    for part in parts:
        for label in part:
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
    return parts[0], parts[1], classes


def sizes(total: int, train: int, test: int, task: str) -> tuple[list[int], list[int]]:
    """Which examples to train and to test on, of so many. ConfigError if there are not enough."""
    if train + test > total:
        raise ConfigError(
            f"data.train + data.test is {train + test}, but task {task!r} has {total} examples;"
            " lower them"
        )
    order = np.random.default_rng(0).permutation(total)[: train + test].tolist()
    return order[:train], order[train:]


def _draw(table: Any, train: int, test: int, task: str) -> tuple[Any, Any]:
    first, second = sizes(len(table), train, test, task)
    return table.select(first), table.select(second)


def _read(data: DataOptions, name: str) -> Any:
    path = Path(str(data.source))
    if (
        path.is_file()
        or (path / "dataset_info.json").exists()
        or (path / "dataset_dict.json").exists()
    ):
        return read_local(path, name)
    if path.is_dir() and any(sign in str(path) for sign in "*?["):
        raise DataError(
            f"folder {str(path)!r} has one of the signs *?[ in its name, which `datasets` reads as"
            " a pattern; rename it"
        )
    found = datasets.load_dataset(str(data.source), data.subset)
    if name not in found:
        raise DataError(f"{str(data.source)!r} has no split {name!r}; it has {', '.join(found)}")
    return found[name]
