"""Images from files and bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evatune.errors import DataError
from evatune.loading.pictures import read_picture
from tests.loading.helpers import write


def test_a_picture_is_read_from_its_file_or_its_bytes_in_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 3), 7).save(tmp_path / "gray.png")
    content = (tmp_path / "gray.png").read_bytes()
    for picture in (
        {"bytes": None, "path": str(tmp_path / "gray.png")},
        {"bytes": content, "path": None},
    ):
        image = read_picture(picture)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (7, 7, 7))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 255, 256, 0x8000, 0xFFFF], "uint16", [0, 0, 1, 128, 255]),
        ([0, 0.2, 1], "float32", [0, 51, 255]),
        ([0, 7, 255], "float32", [0, 7, 255]),
        ([-1, 0, 1], "float32", [0, 128, 255]),
        ([-1e38, np.nan, np.inf, 1e38], "float32", [0, 0, 0, 255]),
        ([np.nan], "float32", [0]),
        ([0, 1, 255], "int32", [0, 1, 255]),
        ([300, 810, 1320], "int32", [0, 128, 255]),
        ([-5, -5], "int32", [0, 0]),
    ],
)
def test_values_that_are_no_bytes_are_brought_to_bytes(
    tmp_path: Path, values: list[float], kind: str, expected: list[int]
) -> None:
    Image.fromarray(np.array([values], kind)).save(tmp_path / "a.tiff")
    image = np.asarray(read_picture({"bytes": None, "path": str(tmp_path / "a.tiff")}))
    assert image[0].tolist() == [[value] * 3 for value in expected]


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    pixels = [(0, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 51)]
    whole = Image.new("RGBA", (3, 1))
    whole.putdata(pixels)
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.putdata([0, 1])
    palette.info["transparency"] = 0
    for picture, expected in (
        (whole, [(255, 255, 255), (255, 0, 0), (204, 204, 204)]),
        (palette, [(255, 255, 255), (0, 0, 255)]),
    ):
        picture.save(tmp_path / "a.png")
        image = read_picture({"bytes": None, "path": str(tmp_path / "a.png")})
        assert [image.getpixel((x, 0)) for x in range(image.width)] == expected


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "png")
    for name, content in (("none.png", b"no image"), ("cut.png", whole.getvalue()[:60])):
        path = write(tmp_path / name, content)
        with pytest.raises(DataError, match=f"{name}' cannot be read as an image .*mend it"):
            read_picture({"bytes": None, "path": str(path)})
