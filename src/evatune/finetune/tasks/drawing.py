"""Images drawn from random numbers: glyphs, plain shapes, pictures on cluttered, noisy grounds; 32
× 32, grey."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Both sets come with matplotlib. The first is for pre-training alone, the second for the task of
# recognising fonts alone.
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
TASK_FONTS = (
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
TASK_LETTERS = "QRaeg"  # in which the fonts differ
CELLS, ANGLES, MOST_SHAPES = 5, 16, 5

# shapes are drawn this many times as large, then averaged down: smooth edges, positions between
# pixels
_FINE = 4
_TURN = 2 * np.pi
_DISC = np.exp(1j * np.linspace(0, _TURN, 24, endpoint=False))
_SQUARE = np.exp(1j * _TURN * (np.arange(4) + 0.5) / 4)
_TRIANGLE = np.exp(1j * _TURN * np.arange(3) / 3)
_STAR = np.exp(1j * _TURN * np.arange(10) / 10) * np.where(np.arange(10) % 2, 0.45, 1)
_SHAPES = (_DISC, _SQUARE, _TRIANGLE, _STAR)

Grey = Any  # float array (SIDE, SIDE), 0 black, 1 white


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
    """A glyph, turned by at most `tilt` degrees.

    Args:
        sizes: of the font, smallest and largest, in pixels. spread: share of the room around the
            glyph in which it moves.
        clear: chance of an even black ground. noise: its largest standard deviation.

    Returns:
        The image, uint8 (32, 32), and its geometry: how far right and down of the middle in half
        sides of the image, height in sides, turn against the clock in half turns.
    """
    ground, ink = (np.zeros((SIDE, SIDE)), 0.9) if rng.random() < clear else _ground(rng)
    found = _font(font, int(rng.integers(sizes[0], sizes[1] + 1)) * 2)
    left, top, right, bottom = found.getbbox(text)
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    ImageDraw.Draw(fine).text(
        (SIDE - (left + right) / 2, SIDE - (top + bottom) / 2), text, fill=255, font=found
    )
    # in pixels of the fine image
    room = spread * np.maximum(0, SIDE - np.array([right - left, bottom - top]) / 2)
    x, y = rng.uniform(-room, room).round()
    turn = rng.uniform(-tilt, tilt)
    fine = fine.rotate(turn, Image.Resampling.BILINEAR, translate=(int(x), int(y)))
    geometry = [x / SIDE, y / SIDE, (bottom - top) / (2 * SIDE), turn / 180]
    return _finished(rng, _painted(ground, fine, ink), noise=noise), geometry


def location(rng: np.random.Generator, label: int) -> Any:
    """A shape whose centre lies in cell `label` of a grid of 5 × 5, row by row. uint8 (32, 32)."""
    ground, ink = _ground(rng)
    row, column = divmod(label, CELLS)
    run_ = (SIDE - 8) / CELLS
    centre = complex(*(4 + run_ * (np.array([column, row]) + rng.uniform(0, 1, 2))))
    return _finished(
        rng,
        _shape(ground, _any_shape(rng), centre, rng.uniform(2, 6), rng.uniform(0, _TURN), ink),
        noise=0.1,
    )


def orientation(rng: np.random.Generator, label: int) -> Any:
    """A dart, slim or broad, that points into sector `label` of 16, clockwise from the right. uint8
    (32, 32)."""
    ground, ink = _ground(rng)
    centre = complex(*rng.uniform(8, SIDE - 8, 2))
    angle = _TURN * (label + rng.uniform(-0.5, 0.5)) / ANGLES
    wing = 1j * rng.uniform(0.35, 0.9)
    dart = np.array([1.25, -0.75 + wing, -0.75 - wing])
    return _finished(rng, _shape(ground, dart, centre, rng.uniform(4, 8), angle, ink), noise=0.06)


def counting(rng: np.random.Generator, label: int) -> Any:
    """`label` + 1 shapes of one kind on an even ground, of unlike size and brightness, apart. uint8
    (32, 32)."""
    image = np.full((SIDE, SIDE), rng.choice([0.1, 0.9]))
    outline = _any_shape(rng)
    placed: list[tuple[complex, float]] = []
    # small shapes find room always: four large ones keep them off 642 of 784 pixels at most
    while len(placed) <= label:
        radius = rng.uniform(2, 4.5)
        centre = complex(*rng.uniform(radius, SIDE - radius, 2))
        if all(abs(centre - other) > 1.1 * (radius + size) for other, size in placed):
            placed.append((centre, radius))
            image = _shape(
                image, outline, centre, radius, rng.uniform(0, _TURN), rng.uniform(0.38, 0.62)
            )
    return _finished(rng, image, noise=0.02)


def fonts(rng: np.random.Generator, label: int) -> Any:
    """One of `TASK_LETTERS` in font `label` of `TASK_FONTS`. uint8 (32, 32)."""
    text = TASK_LETTERS[rng.integers(len(TASK_LETTERS))]
    return letter(rng, text, TASK_FONTS[label], sizes=(24, 32), tilt=10, spread=0.3, noise=0.06)[0]


def scene(rng: np.random.Generator, picture: Image.Image) -> Any:
    """A light-on-black picture near the middle, with strokes over it as bright as it or its ground.
    uint8 (32, 32)."""
    ground, ink = _ground(rng)
    side = int(rng.integers(40, 61))  # in pixels of the fine image
    x, y = rng.integers(-4, 5, 2) + (2 * SIDE - side) // 2
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    fine.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (int(x), int(y)))
    image = _painted(ground, fine, ink)
    for _ in range(3):
        image = _painted(
            image, _stroke(rng, 4), ink if rng.random() < 0.5 else float(ground.mean())
        )
    return _finished(rng, image, noise=0.1)


def _ground(rng: np.random.Generator) -> tuple[Grey, float]:
    """A sloping ground with a few lines on it, and a brightness that stands out from it, either
    way."""
    level, step = rng.uniform(0.1, 0.4), rng.uniform(0.3, 0.5)
    slope = rng.uniform(-0.1, 0.1, 2)
    line = np.linspace(-1, 1, SIDE)
    image = level + slope[0] * line[:, None] + slope[1] * line[None, :]
    for _ in range(rng.integers(0, 4)):
        image = _painted(image, _stroke(rng), level + rng.uniform(-0.2, 0.2))
    ink = level + step
    return (1 - image, 1 - ink) if rng.random() < 0.5 else (image, ink)


def _any_shape(rng: np.random.Generator) -> Any:
    return _SHAPES[rng.integers(len(_SHAPES))]


def _shape(
    image: Grey, outline: Any, centre: complex, radius: float, angle: float, ink: float
) -> Grey:
    corners = _FINE * (centre + radius * outline * np.exp(1j * angle))
    fine = Image.new("L", (_FINE * SIDE, _FINE * SIDE))
    ImageDraw.Draw(fine).polygon([(float(z.real), float(z.imag)) for z in corners], fill=255)
    return _painted(image, fine, ink)


def _stroke(rng: np.random.Generator, width: int | None = None) -> Image.Image:
    """A straight line between two random places; without `width`, of one to three pixels of the
    fine image."""
    fine = Image.new("L", (2 * SIDE, 2 * SIDE))
    ends = [float(x) for x in rng.uniform(0, 2 * SIDE, 4)]
    ImageDraw.Draw(fine).line(ends, fill=255, width=width or int(rng.integers(1, 4)))
    return fine


def _painted(image: Grey, fine: Image.Image, ink: float) -> Grey:
    cover = np.asarray(fine.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64) / 255
    return image * (1 - cover) + ink * cover


def _finished(rng: np.random.Generator, image: Grey, *, noise: float) -> Any:
    noisy = image + rng.uniform(0.02, noise) * rng.standard_normal(image.shape)
    return np.round(255 * noisy.clip(0, 1)).astype(np.uint8)


@cache
def _font(name: str, size: int) -> Any:
    import matplotlib  # which takes long to import, and here only knows where its fonts are

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size
    )
