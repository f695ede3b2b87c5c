"""Images from files and bytes."""

from __future__ import annotations

import io
from pathlib import Path

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


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "png")
    for name, content in (("none.png", b"no image"), ("cut.png", whole.getvalue()[:60])):
        path = write(tmp_path / name, content)
        with pytest.raises(DataError, match=f"{name}' cannot be read as an image .*mend it"):
            read_picture({"bytes": None, "path": str(path)})
