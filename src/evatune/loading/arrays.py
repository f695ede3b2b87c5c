"""Arrays in numpy's npz files, read row by row; nothing is unpickled."""

from __future__ import annotations

import io
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from evatune.errors import DataError

_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
_NUMBERS = "fiub"  # kinds of numpy's types
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Arrays:
    """The arrays of an npz file, by their names.

    Attributes:
        where: the file, for messages.
    """

    opened: zipfile.ZipFile
    where: str

    def rows(
        self, key: str, width: int, most: int, bounds: Sequence[slice] | None = None
    ) -> list[np.ndarray]:
        """Return rows of an array as float32 (n, width): those within each of the bounds.

        Axes of size 1 may stand between the first and the last, and instead of a last one of size
        1 there may be none.

        Args:
            most: rows that it may have.
            bounds: ascending, without overlap; None for one that holds all rows.

        Raises DataError for another shape, values that are no finite numbers, or missing rows.
        """
        try:
            stream = self.opened.open(f"{key}.npy")
        except KeyError:
            names = ", ".join(self.opened.namelist())[:200]
            raise DataError(
                f"{self.where} has no array {key!r}; it holds {names or 'nothing'}"
            ) from None
        with stream:
            count, dtype = self._header(stream, key, width)
            if count > most:
                raise DataError(
                    f"{key} of {self.where} has {count:,} rows; at most {most:,} are read"
                )
            begin, size = stream.tell(), dtype.itemsize * width
            blocks = []
            for bound in [slice(0, count)] if bounds is None else bounds:
                stream.seek(begin + bound.start * size)
                content = stream.read((bound.stop - bound.start) * size)
                if len(content) < (bound.stop - bound.start) * size:
                    raise DataError(f"{key} of {self.where} ends too soon; get it anew")
                blocks.append(np.frombuffer(content, dtype).reshape(-1, width).astype(np.float32))
        if not all(np.isfinite(block).all() for block in blocks):
            raise DataError(f"{key} of {self.where} holds numbers that are not finite; get it anew")
        return blocks

    def _header(self, stream: IO[bytes], key: str, width: int) -> tuple[int, np.dtype[Any]]:
        """Return the number of rows and the type of an array's values, of which none is read."""
        try:
            shape, by_columns, dtype = _HEADERS[npy.read_magic(stream)](stream)
        except (ValueError, KeyError) as error:
            raise DataError(
                f"{key} of {self.where} is no array of numpy ({error}); get it anew"
            ) from error
        if dtype.hasobject:
            raise DataError(
                f"{key} of {self.where} is pickled, and nothing is unpickled here; save it as"
                " numbers"
            )
        right_width = math.prod(shape[1:]) == width and (shape[-1:] == (width,) or width == 1)
        is_table = bool(shape) and all(type(size) is int and size >= 0 for size in shape)
        if dtype.kind not in _NUMBERS or by_columns or not is_table or not right_width:
            order = ", column by column" if by_columns else ""
            expected = "(T,)" if width == 1 else f"(T, {width})"
            raise DataError(
                f"{key} of {self.where} is {dtype} of shape {shape}{order}; numbers of shape"
                f" {expected} belong there"
            )
        return int(shape[0]), dtype


@contextmanager
def arrays_of(file: Path | io.BytesIO, where: str) -> Iterator[Arrays]:
    """Yield the arrays of an npz file; DataError for one that is cut off, or no such file."""
    try:
        with zipfile.ZipFile(file) as opened:
            yield Arrays(opened, where)
    except _ZIP_ERRORS as error:
        raise DataError(f"{where} is no whole npz file ({error}); get it anew") from error
