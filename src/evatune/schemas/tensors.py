"""Files of safetensors, whose header is held against the file before anything is allocated."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evatune.schemas.format_error import FormatError, short_repr
from evatune.schemas.text import fitting, parse_json, readable, require_file

_LENGTH_BYTES = 8  # of the header's length, before the header
_HEADER_BYTES = 64 << 20
_METADATA = "__metadata__"
_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}

_Size = Annotated[int, Field(ge=0, le=2**53)]


class _Entry(BaseModel):
    """A tensor as the header declares it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=16)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class Header:
    """The metadata of a safetensors file, and the shapes of its tensors."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, once it agrees with the size of the file."""
    require_file(path)
    with readable(), path.open("rb") as file:
        size = path.stat().st_size - _LENGTH_BYTES
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 <= length <= size:
            raise FormatError(
                "is damaged or not a safetensors file (its header goes beyond its end)"
            )
        if length > _HEADER_BYTES:
            raise FormatError(
                f"has a header of {length} bytes, and {_HEADER_BYTES} are read at most"
            )
        raw = file.read(length)
    try:
        fields = parse_json(raw.decode("utf-8"))
        with fitting():
            metadata = TypeAdapter(dict[str, str]).validate_python(_take(fields, _METADATA))
            entries = TypeAdapter(dict[str, _Entry]).validate_python(fields)
        _require_covered(entries, size - length)
    except (FormatError, UnicodeDecodeError) as error:
        raise FormatError(f"is damaged or not a safetensors file (its header {error})") from error
    return Header(metadata, {name: tuple(entry.shape) for name, entry in entries.items()})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; see `read_header` for what is looked at first."""
    read_header(path)
    return _load(path)


def save_sealed(path: Path, tensors: Mapping[str, Tensor], kind: str, record: str) -> None:
    """Write tensors and a record with a checksum over both, for `read_sealed`.

    Args:
        kind: name and version of the format. record: any text.
    """
    metadata = {"format": kind, "record": record, "sha256": checksum(tensors, kind, record)}
    save_file(dict(tensors), path, metadata=metadata)


def read_sealed(path: Path, kinds: Sequence[str], what: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the record of a file that `save_sealed` wrote.

    Args:
        kinds: the formats to accept: the one with a checksum, then earlier ones without.
        what: a name for the kind of file, such as "an evatune calibration".
    """
    metadata = read_header(path).metadata
    kind = metadata.get("format")
    if kind not in kinds:
        known = " or ".join(kinds)
        raise FormatError(
            f"is a safetensors file but not {what} (format {short_repr(kind)}, not {known})"
        )
    has_checksum = kind == kinds[0]
    expected = {"format", "record"}
    if has_checksum:
        expected.add("sha256")
    if metadata.keys() != expected:
        raise FormatError(f"is damaged (the metadata of {kind} are {', '.join(sorted(expected))})")
    tensors = _load(path)
    record = metadata["record"]
    if has_checksum and metadata["sha256"] != checksum(tensors, kinds[0], record):
        raise FormatError("is damaged (its contents do not have the checksum that it names)")
    return tensors, record


def checksum(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return the SHA-256, in hexadecimal digits, over texts and over names, types and values."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with readable():
            tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"is damaged ({error})") from error
    return tensors


def _take(fields: object, key: str) -> object:
    if not isinstance(fields, dict):
        raise FormatError("does not hold keys with values")
    return fields.pop(key, {})


def _require_covered(entries: Mapping[str, _Entry], size: int) -> None:
    """Raise FormatError unless the tensors fill the rest of the file, one after the other."""
    end = 0
    in_order = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    for name, entry in in_order:
        if entry.dtype not in _BYTES:
            raise FormatError(f"names the type {short_repr(entry.dtype)} for {short_repr(name)}")
        first, last = entry.data_offsets
        nbytes = math.prod(entry.shape) * _BYTES[entry.dtype]
        if first != end or last - first != nbytes:
            raise FormatError(
                f"declares {short_repr(name)} as {short_repr(entry.shape)}, which is not its size"
            )
        end = last
    if end != size:
        raise FormatError(f"declares {end} bytes of tensors, and {size} are there")
