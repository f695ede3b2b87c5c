"""Images from the bytes of their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evatune.errors import DataError
from evatune.utils.extras import extras
from evatune.utils.text import one_line

with extras(__name__):
    import datasets
    from PIL import Image, UnidentifiedImageError


def read_picture(picture: Mapping[str, Any]) -> Image.Image:
    """Return an image in RGB, without what is transparent, on white.

    Values that are no bytes are brought to 0…255: those of 16 bits by 256; those from 0 to 1 of
    floating point times 255; others that go below 0 or above 255 from the image's least to its
    greatest. What is not finite becomes the least.

    Args:
        picture: {"bytes", "path"}, as `datasets` gives it undecoded.

    Raises DataError for what cannot be read.
    """
    path, content = picture["path"], picture["bytes"]
    try:
        if content is None and path is not None:
            content = Path(path).read_bytes()
        image: Image.Image = datasets.Image().decode_example({"path": path, "bytes": content})
        return _flat(_in_bytes(image)).convert("RGB")
    except UnidentifiedImageError as error:  # which names an object of Python's
        raise _unreadable(path, "its format is not known") from error
    # as Pillow raises them
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, one_line(error)) from error


def _in_bytes(image: Image.Image) -> Image.Image:
    """Return an image with a byte for each value; `convert` would cut greater values off."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    least, greatest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.where(np.isfinite(values), values, least)
    if image.mode == "F" and least >= 0 and greatest <= 1:
        values = values * 255
    elif least < 0 or greatest > 255:
        values = (values - least) * (255 / ((greatest - least) or 1))
    return Image.fromarray(np.round(values).astype(np.uint8))


def _flat(image: Image.Image) -> Image.Image:
    """Return an image on white; `convert` would show the colors of what is transparent."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _unreadable(path: str | None, reason: str) -> DataError:
    name = "an image" if path is None else repr(path)
    return DataError(
        f"{name} cannot be read as an image ({reason}); mend it, or move it out of the data"
    )
