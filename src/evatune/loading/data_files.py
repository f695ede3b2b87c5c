"""Data files on this machine: which are read, and which one is at fault where they cannot be.

`datasets` takes names for patterns, does not say which file an error is about, and the reader below
it ends the process on some of what is JSON but no record. So names are handed over as they are, and
JSON is checked first (`file_checks`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evatune.errors import DataError
from evatune.loading.demo import is_demo_data
from evatune.loading.error_text import reason
from evatune.loading.file_checks import require_records, require_utf8
from evatune.utils.extras import extras

with extras(__name__):
    import datasets
    from datasets.data_files import DataFilesList

_KINDS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COLUMNS_SHOWN = 6
_NO_SPLIT = "Unknown split"  # begins the error of `datasets` for one that is not there


def kind_of(path: Path) -> str | None:
    """Return what a file's ending says about it; None for a kind that is not read."""
    return _KINDS.get(path.suffix.lower())


def is_saved_by_datasets(path: Path) -> bool:
    """Return whether `path` is a folder that `datasets` saved, with or without splits."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def read_data_files(path: Path, split: str) -> Any:
    """Return one split of a file, of a folder of files, or of a folder that `datasets` saved.

    Raises DataError for what cannot be read.
    """
    if is_saved_by_datasets(path):
        return _one_split(datasets.load_from_disk(str(path)), path, split)
    files = [path] if path.is_file() else _files_in(path)
    kind = _common_kind(path, files)
    check_content(kind, files)
    reading = reading_options(kind, files, one_document=path.is_dir())
    builder = _prepared("csv" if kind == "tsv" else kind, files, reading)
    with existing_split(path, split):
        return builder.as_dataset(split=split)


@contextmanager
def existing_split(source: str | Path, split: str) -> Iterator[None]:
    """Turn the error of `datasets` for a split that is not there into one that names those."""
    try:
        yield
    except ValueError as error:
        message = reason(error)
        if not message.startswith(_NO_SPLIT):
            raise
        names = re.findall(r"'([^']+)'", message)
        raise unknown_split(source, split, names) from error


def unknown_split(source: str | Path, split: str, names: Sequence[str]) -> DataError:
    """Return the error for a split that is none of those named."""
    return DataError(f"{str(source)!r} has no split {split!r}; choose one of {', '.join(names)}")


def check_content(kind: str | None, files: Sequence[Path]) -> None:
    """Raise a DataError for content that the reader of this kind must not see."""
    if kind == "json":
        for file in files:
            require_records(file)
    if kind in ("csv", "tsv", "text"):
        for file in files:
            if not is_demo_data(file):
                require_utf8(file)


def reading_options(
    kind: str | None, files: Sequence[Path], *, one_document: bool
) -> dict[str, Any]:
    """Return the options with which `datasets` reads files of one kind.

    Args:
        one_document: a text file is one record; else each of its lines is.
    """
    if kind == "text":
        # Only the demo data hold bytes to replace: others are checked before.
        # A mark of the encoding (BOM) at the start of a file is no text.
        unit = "document" if one_document else "line"
        return {"sample_by": unit, "encoding": "utf-8-sig", "encoding_errors": "replace"}
    if kind not in ("csv", "tsv"):
        return {}
    # Words that pandas takes for a gap, such as None and NA, are texts like any other.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
    if kind == "tsv":
        options["sep"] = "\t"
        if not all(map(_quotes_cells, files)):
            options["quoting"] = csv.QUOTE_NONE
    return options


def _quotes_cells(path: Path) -> bool:
    """Return whether the quotes around cells of a TSV file are those of CSV, and no text.

    They are if each cell that begins with a quote ends with one, and those within are doubled, as
    pandas writes it. GLUE's files and others quote nothing, and a cell may begin with a quotation.
    Where some of these would only end in a later cell or line, although the file is a table of
    several columns without that, each of its lines is a row, and the quotes are text.
    """
    is_open = goes_on = False
    widths = set()
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in filter(str.strip, file):
            cells = line.rstrip("\n").split("\t")
            widths.add(len(cells))
            for cell in cells:
                if not is_open and not cell.startswith('"'):
                    continue
                inner = (cell if is_open else cell[1:]).replace('""', "")
                if '"' in inner[:-1]:
                    return False
                is_open = not inner.endswith('"')
                goes_on |= is_open
    is_table = len(widths) == 1 and widths != {1}
    return not is_open and not (goes_on and is_table)


def _files_in(folder: Path) -> list[Path]:
    """Return the data files anywhere below a folder.

    Hidden files and those that systems and editors leave are no data.
    """
    return sorted(path for path in folder.rglob("*") if _is_data(path, folder))


def _is_data(path: Path, folder: Path) -> bool:
    return not is_hidden(path, folder) and kind_of(path) is not None and path.is_file()


def is_hidden(path: Path, folder: Path) -> bool:
    """Return whether a file below a folder is one that systems and tools put there."""
    *parents, name = path.relative_to(folder).parts
    return name.startswith(".") or any(parent.startswith((".", "__")) for parent in parents)


def _common_kind(path: Path, files: Sequence[Path]) -> str:
    """Return the kind of all files; DataError where there is none, or more than one."""
    endings = ", ".join(_KINDS)
    if not files:
        raise DataError(
            f"folder {str(path)!r} holds no file that ends in {endings}; give one that does, or a"
            " file (images go to --images)"
        )
    if "::" in str(path.absolute()):
        raise DataError(
            f"{str(path)!r} has '::' in its name, which `datasets` reads as a chain of addresses;"
            " rename it"
        )
    kinds = {kind_of(file) for file in files}
    suffixes = ", ".join(sorted({file.suffix or file.name for file in files}))
    if len(kinds) > 1:
        raise DataError(
            f"folder {str(path)!r} mixes kinds of files ({suffixes}); give one of the files, or a"
            " folder of one kind"
        )
    kind = kinds.pop()
    if kind is None:
        raise DataError(
            f"{str(path)!r} is of a kind that is not read ({suffixes}); give a file that ends in"
            f" {endings}"
        )
    if all(file.stat().st_size == 0 for file in files):
        raise DataError(f"{str(path)!r} is empty; give data with at least one text")
    return kind


def _one_split(saved: Any, path: Path, split: str) -> Any:
    has_splits = isinstance(saved, datasets.DatasetDict)
    names = list(saved) if has_splits else ["train"]
    if split not in names:
        raise unknown_split(path, split, names)
    return saved[split] if has_splits else saved


def _prepared(kind: str, files: Sequence[Path], options: dict[str, Any]) -> Any:
    """Return the builder of `datasets` that has read these files."""
    try:
        return _build(kind, files, options)
    except Exception as error:
        if len(files) == 1:
            raise
        culprit = files[_longest_readable(kind, files, options)]
        raise _culprit_error(kind, files[0], culprit, options, error) from error


def _longest_readable(kind: str, files: Sequence[Path], options: dict[str, Any]) -> int:
    """Return how many of the first files can be read together; the next one is at fault."""
    good, bad = 0, len(files)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            _build(kind, files[:middle], options)
            good = middle
        except Exception:
            bad = middle
    return good


def _build(kind: str, files: Sequence[Path], options: dict[str, Any]) -> Any:
    # As it comes out of resolving patterns; time and size are what tells a file that changed from
    # one in the cache.
    stats = [file.stat() for file in files]
    literal = DataFilesList(
        [str(file.absolute()) for file in files],
        [(str(stat.st_mtime_ns), str(stat.st_size)) for stat in stats],
    )
    builder = datasets.load_dataset_builder(kind, data_files={"train": literal}, **options)
    builder.download_and_prepare()
    return builder


def _culprit_error(
    kind: str, first: Path, file: Path, options: dict[str, Any], error: Exception
) -> DataError:
    """Return the error that names the file which cannot be read, alone or with the first one."""
    columns = []
    for single in (first, file):
        try:
            table = _build(kind, [single], options).as_dataset(split="train")
        except Exception as alone:
            return DataError(
                f"{str(single)!r} cannot be read: {reason(alone)} Mend it, or move it out of the"
                " folder"
            )
        columns.append(_columns(table))
    if columns[0] == columns[1]:
        return DataError(
            f"{str(file)!r} cannot be read together with {str(first)!r}: {reason(error)} Give one"
            " of them"
        )
    header = "; the first line of such a file must name its columns" if kind == "csv" else ""
    return DataError(
        f"{str(file)!r} has other columns ({columns[1]}) than {str(first)!r} ({columns[0]}); give"
        f" files with the same columns, or one file{header}"
    )


def _columns(table: Any) -> str:
    """Return the first columns of a table with their types."""
    columns = []
    for name, feature in table.features.items():
        dtype = getattr(feature, "dtype", type(feature).__name__)
        columns.append(f"{name[:40]} of {dtype}")
    more = ", …" if len(columns) > _COLUMNS_SHOWN else ""
    return ", ".join(columns[:_COLUMNS_SHOWN]) + more
