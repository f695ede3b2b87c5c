"""Arrays of npz files."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest

from evatune.errors import DataError
from evatune.loading.arrays import arrays_of


def file_of(**values: Any) -> io.BytesIO:
    stream = io.BytesIO()
    np.savez_compressed(stream, **values)
    stream.seek(0)
    return stream


def rows(values: Any, width: int, *bounds: slice) -> list[np.ndarray]:
    with arrays_of(file_of(a=values), "a file") as arrays:
        return arrays.rows("a", width, 100, bounds or None)


@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", "i8", "u1", "?"])
def test_rows_are_those_of_the_bounds_in_float32(dtype: str) -> None:
    values = (np.arange(60).reshape(20, 3) % 7).astype(dtype)
    first, second = rows(values, 3, slice(2, 5), slice(11, 20))
    np.testing.assert_array_equal(first, values[2:5].astype("f4"))
    np.testing.assert_array_equal(second, values[11:20].astype("f4"))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(rows(values, 3)[0], values.astype("f4"))


def test_axes_of_size_one_may_be_there_or_not() -> None:
    assert rows(np.zeros((5, 1, 3)), 3)[0].shape == (5, 3)
    assert rows(np.zeros(5), 1)[0].shape == rows(np.zeros((5, 1)), 1)[0].shape == (5, 1)


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        (np.zeros((4, 3)), 1, r"a of a file is float64 of shape \(4, 3\); .* shape \(T,\) belong"),
        (np.zeros((4, 3, 1)), 3, r"of shape \(4, 3, 1\); numbers of shape \(T, 3\) belong there"),
        (np.zeros(()), 1, r"of shape \(\); numbers"),
        (np.asfortranarray(np.zeros((4, 3))), 3, "column by column; numbers of shape"),
        (np.array(["x"] * 4), 1, r"is <U1 of shape \(4,\); numbers"),
        (np.zeros(4, "c8"), 1, "is complex64 of shape"),
        (np.array([object()]), 1, "is pickled, and nothing is unpickled here"),
        (np.full(4, np.nan), 1, "holds numbers that are not finite"),
        (np.zeros(101), 1, "has 101 rows; at most 100 are read"),
    ],
)
def test_what_is_no_such_table_of_numbers_is_refused(values: Any, width: int, text: str) -> None:
    with pytest.raises(DataError, match=text):
        rows(values, width)


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(DataError, match="a of a file ends too soon"):
        rows(np.zeros(5), 1, slice(0, 2), slice(3, 6))
    with (
        pytest.raises(DataError, match=r"has no array 'b'; it holds a\.npy"),
        arrays_of(file_of(a=np.zeros(5)), "a file") as arrays,
    ):
        arrays.rows("b", 1, 100)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no more", b"\x80\x04}."])
def test_what_is_no_npz_file_is_refused(content: bytes) -> None:
    with (
        pytest.raises(DataError, match="a file is no whole npz file"),
        arrays_of(io.BytesIO(content), "a file"),
    ):
        pass


def test_an_array_whose_header_is_damaged_is_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        opened.writestr("a.npy", b"\x93NUMPY\x01\x00\x05\x00{'x'}")
    with (
        pytest.raises(DataError, match="a of a file is no array of numpy"),
        arrays_of(stream, "a file") as arrays,
    ):
        arrays.rows("a", 1, 100)


@pytest.mark.parametrize("rows", ["-1", "True"])
def test_a_header_with_another_number_of_rows_is_refused(rows: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 39), }}"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        content = header.ljust(117).encode() + b"\n"
        opened.writestr("a.npy", b"\x93NUMPY\x01\x00v\x00" + content + bytes(39 * 4 * 1000))
    with (
        pytest.raises(DataError, match="a of a file is"),
        arrays_of(stream, "a file") as arrays,
    ):
        arrays.rows("a", 39, 10)


def test_a_damaged_member_of_another_compression_is_told() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_LZMA) as opened:
        opened.writestr("a.npy", file_of(a=np.zeros(50)).getvalue())
    damaged = bytearray(stream.getvalue())
    damaged[60:90] = bytes(30)
    with (
        pytest.raises(DataError, match="a file is no whole npz file"),
        arrays_of(io.BytesIO(damaged), "a file") as arrays,
    ):
        arrays.rows("a", 1, 100)
