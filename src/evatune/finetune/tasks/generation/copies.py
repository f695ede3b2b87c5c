"""Rows of data sets of the hub, or of copies of them in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from evatune.errors import DataError
from evatune.finetune.recipe import DataOptions
from evatune.loading.hub import reading
from evatune.loading.tables import load_split

HUB = "hub"  # as data.source: the hub's own
_INSTEAD = "a folder with copies of the sets, as in data.source=FOLDER"
_Read = TypeVar("_Read")


def read_rows(
    data: DataOptions, name: str, subset: str | None, split: str, read: Callable[[Any], _Read]
) -> list[_Read]:
    """Return what `read` makes of each row of a split.

    Args:
        data: its source is "hub", or a folder with a folder `NAME` or `NAME/SUBSET` for each set,
            as `datasets` saves them.

    Raises DataError for a set that cannot be had, or a row that `read` cannot read.
    """
    source = name
    if data.source != HUB:
        folder = Path(str(data.source), name)
        source = str(folder / subset if subset and (folder / subset).is_dir() else folder)
        if not Path(source).is_dir():
            raise DataError(
                f"there is no folder {source!r}; give data.source={HUB}, or a folder with copies"
                " of the sets by their ids on the hub"
            )
    with reading(source, "data", _INSTEAD):
        rows = load_split(source, split, subset)
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(read(row))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"row {number} of {source!r}, split {split!r}, is no question with its right"
                f" answer ({type(error).__name__}: {error}); get the data set anew"
            ) from error
    return found
