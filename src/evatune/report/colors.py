"""Colors of text on a ground, by the contrast of WCAG."""

from __future__ import annotations

Color = tuple[int, int, int]  # sRGB, each from 0 to 255

BLACK, WHITE = "#000000", "#ffffff"


def ink_on(ground: Color, dark: str = BLACK) -> str:
    """Return the dark color or white, whichever has more contrast.

    Black or white has at least 4.5 on any ground (WCAG AA).
    """
    return dark if contrast(ground, rgb(dark)) >= contrast(ground, rgb(WHITE)) else WHITE


def contrast(first: Color, second: Color) -> float:
    """Return WCAG's contrast ratio of two colors, from 1 to 21."""
    darker, lighter = sorted((_luminance(first), _luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def rgb(color: str) -> Color:
    """Return a color that is written "#rrggbb"."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue


def _luminance(color: Color) -> float:
    red, green, blue = (_linear(channel / 255) for channel in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
