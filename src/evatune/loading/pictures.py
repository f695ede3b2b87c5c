"""Images from the bytes of their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evatune.errors import DataError
from evatune.utils.extras import extras

with extras(__name__):
    import datasets
    from PIL import Image, UnidentifiedImageError


def read_picture(picture: Mapping[str, Any]) -> Image.Image:
    """Return an image in RGB.

    Args:
        picture: {"bytes", "path"}, as `datasets` gives it undecoded.

    Raises DataError for what cannot be read.
    """
    path, content = picture["path"], picture["bytes"]
    try:
        if content is None and path is not None:
            content = Path(path).read_bytes()
        image: Image.Image = datasets.Image().decode_example({"path": path, "bytes": content})
        return image.convert("RGB")
    except UnidentifiedImageError as error:  # which names an object of Python's
        raise _unreadable(path, "its format is not known") from error
    # as Pillow raises them
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, " ".join(str(error).split())[:200]) from error


def _unreadable(path: str | None, reason: str) -> DataError:
    name = "an image" if path is None else repr(path)
    return DataError(
        f"{name} cannot be read as an image ({reason}); mend it, or move it out of the data"
    )
