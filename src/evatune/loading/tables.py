"""Data sets as tables: a split of a hub's, of a file, of a folder of files, of a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evatune.errors import DataError
from evatune.loading.data_files import (
    existing_split,
    is_saved_by_datasets,
    read_data_files,
    unknown_split,
)
from evatune.loading.hub import reading, require_path
from evatune.utils.extras import extras

with extras(__name__):
    import datasets


def load_table(source: str | Path, split: str = "train") -> Any:
    """Return a split as a `datasets.Dataset`.

    Args:
        source: a hub id; a folder that `datasets` saved, or one with text (a document per file),
            JSON, CSV or Parquet files anywhere below it; or one such file (text: a document per
            line).
        split: of a hub data set, or of a saved one with splits.

    Raises DataError for what cannot be read.
    """
    require_path(source, "data")
    path = Path(source)
    with reading(source, "data", "a folder or file of text, JSON Lines, CSV or Parquet"):
        if path.exists():
            return read_data_files(path, split)
        with existing_split(source, split):
            return datasets.load_dataset(str(source), split=split)


def load_split(source: str | Path, split: str, subset: str | None = None) -> Any:
    """Return a split by its name, of images too: a folder of them has a label per subfolder.

    Args:
        subset: configuration of a hub data set.

    Raises DataError for a folder or split that is not there; libraries raise errors of their own.
    """
    path = Path(source)
    if path.is_file() or is_saved_by_datasets(path):
        return read_data_files(path, split)
    if path.is_dir() and any(sign in str(path) for sign in "*?["):
        raise DataError(
            f"folder {str(path)!r} has one of the signs *?[ in its name, which `datasets` reads as"
            " a pattern; rename it"
        )
    splits = datasets.load_dataset(str(source), subset)
    if split not in splits:
        raise unknown_split(source, split, list(splits))
    return splits[split]
