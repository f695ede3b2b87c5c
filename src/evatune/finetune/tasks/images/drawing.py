"""Tools to draw 32 × 32 gray images from random numbers: glyphs and shapes on noisy grounds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# They come with matplotlib, as do the other fonts of the task of recognizing fonts.
PRETRAINING_FONTS = tuple(
    f"DejaVu{family}"
    for family in (
        "Sans",
        "Sans-Bold",
        "Sans-Oblique",
        "Sans-BoldOblique",
        "SansMono",
        "SansMono-Bold",
        "SansMono-Oblique",
        "SansMono-BoldOblique",
        "Serif",
        "Serif-Bold",
        "Serif-Italic",
        "Serif-BoldItalic",
    )
)

# shapes are drawn this many times as large, then averaged down: smooth edges, positions between
# pixels
_FINE = 4
TURN = 2 * np.pi
DISC = np.exp(1j * np.linspace(0, TURN, 24, endpoint=False))
SQUARE = np.exp(1j * TURN * (np.arange(4) + 0.5) / 4)
TRIANGLE = np.exp(1j * TURN * np.arange(3) / 3)
STAR = np.exp(1j * TURN * np.arange(10) / 10) * np.where(np.arange(10) % 2, 0.45, 1)
_SHAPES = (DISC, SQUARE, TRIANGLE, STAR)

Gray = Any  # float array (SIDE, SIDE), 0 black, 1 white


def letter(
    rng: np.random.Generator,
    text: str,
    font: str,
    *,
    sizes: tuple[int, int],
    tilt: float,
    spread: float = 1,
    clear: float = 0,
    noise: float = 0.1,
) -> tuple[Any, list[float]]:
    """Return a glyph, turned by at most `tilt` degrees.

    Args:
        sizes: of the font, smallest and largest, in pixels. spread: share of the room around the
            glyph in which it moves.
        clear: chance of an even black ground. noise: its largest standard deviation.

    Returns:
        The image, uint8 (32, 32), and its geometry: how far right and down of the middle in half
        sides of the image, height in sides, turn counterclockwise in half turns.
    """
    if rng.random() < clear:
        ground, ink = np.zeros((SIDE, SIDE)), 0.9
    else:
        ground, ink = ground_and_ink(rng)
    typeface = load_font(font, 2 * int(rng.integers(sizes[0], sizes[1] + 1)))
    left, top, right, bottom = typeface.getbbox(text)
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    corner = (SIDE - (left + right) / 2, SIDE - (top + bottom) / 2)
    ImageDraw.Draw(fine).text(corner, text, fill=255, font=typeface)
    # in pixels of the fine image
    room = spread * np.maximum(0, SIDE - np.array([right - left, bottom - top]) / 2)
    x, y = rng.uniform(-room, room).round()
    turn = rng.uniform(-tilt, tilt)
    fine = fine.rotate(turn, Image.Resampling.BILINEAR, translate=(int(x), int(y)))
    geometry = [x / SIDE, y / SIDE, (bottom - top) / (2 * SIDE), turn / 180]
    return finish(rng, paint(ground, fine, ink), noise=noise), geometry


def ground_and_ink(rng: np.random.Generator) -> tuple[Gray, float]:
    """Return a sloping ground with a few lines on it, and a brightness that stands out from it.

    The ink is lighter or darker than the ground.
    """
    level, step = rng.uniform(0.1, 0.4), rng.uniform(0.3, 0.5)
    slope = rng.uniform(-0.1, 0.1, 2)
    line = np.linspace(-1, 1, SIDE)
    image = level + slope[0] * line[:, None] + slope[1] * line[None, :]
    for _ in range(rng.integers(0, 4)):
        image = paint(image, stroke(rng), level + rng.uniform(-0.2, 0.2))
    ink = level + step
    return (1 - image, 1 - ink) if rng.random() < 0.5 else (image, ink)


def any_shape(rng: np.random.Generator) -> Any:
    """Return the outline of one of the shapes, as complex numbers around 0."""
    return _SHAPES[rng.integers(len(_SHAPES))]


def draw_shape(
    image: Gray, outline: Any, center: complex, radius: float, angle: float, ink: float
) -> Gray:
    """Return the image with a filled shape on it; center and radius are in pixels."""
    corners = _FINE * (center + radius * outline * np.exp(1j * angle))
    fine = Image.new("L", (_FINE * SIDE, _FINE * SIDE))
    polygon = [(float(corner.real), float(corner.imag)) for corner in corners]
    ImageDraw.Draw(fine).polygon(polygon, fill=255)
    return paint(image, fine, ink)


def stroke(rng: np.random.Generator, width: int | None = None) -> Image.Image:
    """Return a straight line between two random places.

    Without `width`, it has one to three pixels of the fine image.
    """
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    ends = [float(x) for x in rng.uniform(0, 2 * SIDE, 4)]
    ImageDraw.Draw(fine).line(ends, fill=255, width=width or int(rng.integers(1, 4)))
    return fine


def paint(image: Gray, fine: Image.Image, ink: float) -> Gray:
    """Return the image with ink where the finer image is white."""
    small = fine.resize((SIDE, SIDE), Image.Resampling.BOX)
    cover = np.asarray(small, dtype=np.float64) / 255
    return image * (1 - cover) + ink * cover


def finish(rng: np.random.Generator, image: Gray, *, noise: float) -> Any:
    """Return the image with noise of a random strength up to `noise`, as uint8 (32, 32)."""
    noisy = image + rng.uniform(0.02, noise) * rng.standard_normal(image.shape)
    return np.round(255 * noisy.clip(0, 1)).astype(np.uint8)


@cache
def load_font(name: str, size: int) -> Any:
    """Return a font of matplotlib's by its name, so many pixels tall."""
    import matplotlib  # which takes long to import, and here only knows where its fonts are

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size)
