"""Data sets as tables: a split of a hub's, of a file, of a folder of files, of a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evatune.errors import DataError
from evatune.loading.data_files import (
    check_content,
    existing_split,
    is_hidden,
    is_saved_by_datasets,
    kind_of,
    read_data_files,
    reading_options,
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
    splits = (
        _splits_of(path, subset) if path.is_dir() else datasets.load_dataset(str(source), subset)
    )
    if split not in splits:
        raise unknown_split(source, split, list(splits))
    return splits[split]


def _splits_of(folder: Path, subset: str | None) -> Any:
    """Return the splits that `datasets` makes of a folder, its files read as by `load_table`.

    Raises DataError where it leaves files out. It takes names such as train and test_2 for those
    of splits, also those of classes and of years, and then reads no others; a list of its own in
    README.md is what the user wants.
    """
    builder = datasets.load_dataset_builder(str(folder), subset)
    root, readme = folder.resolve(), folder / "README.md"
    read = {Path(file) for files in (builder.config.data_files or {}).values() for file in files}
    has_list = readme.is_file() and "configs:" in readme.read_text("utf-8", "replace")
    if not has_list:
        endings = {file.suffix.lower() for file in read}
        found = (
            path for path in root.rglob("*") if path.suffix.lower() in endings and path.is_file()
        )
        left = sorted(path for path in found if not is_hidden(path, root) and path not in read)
        if left:
            raise DataError(
                f"{len(left):,} of the files of folder {str(folder)!r} would be left out, such as"
                f" {str(left[0].relative_to(root))!r}, because names of others say a split"
                f" ({', '.join(map(str, builder.config.data_files))}); move all that it holds into"
                " a subfolder named train, or into one for each split"
            )
    kinds, files = {kind_of(path) for path in read}, sorted(read)
    kind = kinds.pop() if len(kinds) == 1 else None
    check_content(kind, files)
    if kind is not None and not has_list:  # which may have options of its own
        options = reading_options(kind, files, one_document=True)
        builder = datasets.load_dataset_builder(str(folder), subset, **options)
    builder.download_and_prepare()
    return builder.as_dataset()
