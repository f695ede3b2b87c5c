"""Data files on this machine: which of them are read, and which one is at fault where they cannot
be.

`datasets` takes names for patterns, does not say which file an error is about, and the reader below
it ends the process on some of what is JSON but no record. So names are handed over as they are, and
JSON is looked at before.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesList

from evatune.errors import DataError

_KINDS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


_LONGEST_LINE = 256 << 20  # bytes of a record in JSON Lines


_LARGEST_DOCUMENT = 1 << 30  # bytes of one JSON document, which is read as a whole


_CHUNK = 1 << 20


_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def kind_of(path: Path) -> str | None:
    """Return what a file's ending says about it; None for a kind that is not read."""
    return _KINDS.get(path.suffix.lower())


def read_local(path: Path, split: str) -> Any:
    """Return one split of files or of a folder that `datasets` saved. DataError for what is not
    read."""
    if path.is_dir() and (
        (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
    ):
        return _one_split(datasets.load_from_disk(str(path)), path, split)
    files = [path] if path.is_file() else _files_in(path)
    kind = _common_kind(path, files)
    if kind == "json":
        for file in files:
            _require_records(file)
    elif kind in ("csv", "tsv"):
        for file in files:
            _require_utf8(file)
    options: dict[str, Any] = {}
    if kind == "text":
        options = {
            "sample_by": "document" if path.is_dir() else "line",
            "encoding_errors": "replace",
        }
    elif kind == "tsv":
        kind, options = "csv", {"sep": "\t"}
    return _prepared(kind, files, options).as_dataset(split=split)


def _files_in(folder: Path) -> list[Path]:
    """Return the data files anywhere below a folder, but for hidden ones and those that systems and
    editors leave."""

    def wanted(path: Path) -> bool:
        *above, name = path.relative_to(folder).parts
        hidden = name.startswith(".") or any(part.startswith((".", "__")) for part in above)
        return not hidden and kind_of(path) is not None and path.is_file()

    return sorted(path for path in folder.rglob("*") if wanted(path))


def _common_kind(path: Path, files: Sequence[Path]) -> str:
    endings = ", ".join(_KINDS)
    if not files:
        raise DataError(
            f"folder {str(path)!r} holds no file that ends in {endings}; give one that does, or a"
            " file"
        )
    if "::" in str(path.absolute()):
        raise DataError(
            f"{str(path)!r} has '::' in its name, which `datasets` reads as a chain of addresses;"
            " rename it"
        )
    kinds = {kind_of(file) for file in files}
    found = ", ".join(sorted({file.suffix or file.name for file in files}))
    if len(kinds) > 1:
        raise DataError(
            f"folder {str(path)!r} mixes kinds of files ({found}); give one of the files, or a"
            " folder of one kind"
        )
    kind = kinds.pop()
    if kind is None:
        raise DataError(
            f"{str(path)!r} is of a kind that is not read ({found}); give a file that ends in"
            f" {endings}"
        )
    if all(file.stat().st_size == 0 for file in files):
        raise DataError(f"{str(path)!r} is empty; give data with at least one text")
    return kind


def _one_split(saved: Any, path: Path, split: str) -> Any:
    names = list(saved) if isinstance(saved, datasets.DatasetDict) else ["train"]
    if split not in names:
        raise DataError(f"{str(path)!r} has no split {split!r}; choose one of {', '.join(names)}")
    return saved[split] if isinstance(saved, datasets.DatasetDict) else saved


def _prepared(kind: str, files: Sequence[Path], options: dict[str, Any]) -> Any:
    """Return the builder of `datasets` that has read these files."""
    try:
        return _build(kind, files, options)
    except Exception as error:
        if len(files) == 1:
            raise
        # The shortest beginning of the list that cannot be read ends with the file at fault.
        good, bad = 0, len(files)
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                _build(kind, files[:middle], options)
                good = middle
            except Exception:
                bad = middle
        raise _at_fault(kind, files[0], files[bad - 1], options, error) from error


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


def _at_fault(
    kind: str, first: Path, file: Path, options: dict[str, Any], error: Exception
) -> DataError:
    """Return the error that names the file which cannot be read, alone or with the first one."""
    columns = []
    for one in (first, file):
        try:
            columns.append(_columns(_build(kind, [one], options).as_dataset(split="train")))
        except Exception as alone:
            return DataError(
                f"{str(one)!r} cannot be read: {reason(alone)} Mend it, or move it out of the"
                " folder"
            )
    header = "; the first line of such a file must name its columns" if kind == "csv" else ""
    if columns[0] == columns[1]:
        return DataError(
            f"{str(file)!r} cannot be read together with {str(first)!r}: {reason(error)} Give one"
            " of them"
        )
    return DataError(
        f"{str(file)!r} has other columns ({columns[1]}) than {str(first)!r} ({columns[0]}); give"
        f" files with the same columns, or one file{header}"
    )


def _columns(data: Any, most: int = 6) -> str:
    kinds = [
        f"{name[:40]} of {getattr(feature, 'dtype', type(feature).__name__)}"
        for name, feature in data.features.items()
    ]
    return ", ".join(kinds[:most]) + (", …" if len(kinds) > most else "")


def reason(error: BaseException) -> str:
    """Return the first line of the root cause: `datasets` says no more than that an error
    occurred."""
    return first_line(root_cause(error))


def root_cause(error: BaseException) -> BaseException:
    """Return what `datasets` wrapped up."""
    while (
        isinstance(error, datasets.exceptions.DatasetGenerationError)
        and error.__cause__ is not None
    ):
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return an error's first line as a sentence."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


# -- what the readers must not see -----------------------------------------------------------------


def _require_utf8(path: Path) -> None:
    """Raise a DataError that names the line of the first byte which is not UTF-8."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(
                    path, line + error.object.count(b"\n", 0, error.start), error
                ) from None
            line += chunk.count(b"\n")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, line, error) from None


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{str(path)!r} is not UTF-8: line {line} holds the byte 0x{error.object[error.start]:02x}"
        " of another encoding, such as Latin-1 or UTF-16; write the file as UTF-8, for example"
        " with: iconv -f LATIN1 -t UTF-8"
    )


def _require_records(path: Path) -> None:
    """Raise a DataError unless a file holds JSON objects, one a line, or one JSON document of
    them."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                raise DataError(
                    f"line {number} of {str(path)!r} is longer than {_LONGEST_LINE >> 20} MiB;"
                    " write one record a line"
                )
            try:
                record = _json(path, number, line) if line.strip() else {}
            except json.JSONDecodeError as error:
                if _is_document(path):
                    return
                raise DataError(
                    f"line {number} of {str(path)!r} is not JSON: {error}; mend it, or take it out"
                ) from error
            if isinstance(record, list) and number == 1 and _is_document(path):
                return
            if not isinstance(record, dict):
                raise _no_record(path, f"line {number}", record)


def _is_document(path: Path) -> bool:
    """Return whether a file is one JSON document; DataError where that is none of records or of
    texts."""
    if path.stat().st_size > _LARGEST_DOCUMENT:
        return False
    try:
        found = _json(path, 1, path.read_bytes())
    except json.JSONDecodeError:
        return False
    records = found if isinstance(found, list) else [found]
    if not records:
        raise DataError(f"{str(path)!r} is empty; give data with at least one text")
    kind = str if isinstance(found, list) and isinstance(records[0], str) else dict
    for number, record in enumerate(records, 1):
        if not isinstance(record, kind):
            raise _no_record(path, f"entry {number}", record)
    return True


def _json(path: Path, line: int, raw: bytes) -> Any:
    try:
        # of any number of digits
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode("utf-8"), parse_int=float)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, line + error.object.count(b"\n", 0, error.start), error) from None
    except RecursionError:
        raise DataError(
            f"line {line} of {str(path)!r} is nested too deeply; give records of plain values"
        ) from None


def _no_record(path: Path, where: str, found: Any) -> DataError:
    return DataError(
        f"{where} of {str(path)!r} is {_JSON_NAMES[type(found)]}, which is no record; write each as"
        ' an object, such as {"text": "…"}'
    )
