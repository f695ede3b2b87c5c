"""LoRA's scale of BA: α/r, and α/√r under rsLoRA."""

from __future__ import annotations


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Return the factor of BA in a layer of this α and rank."""
    return alpha / scale_divisor(rank, rslora)


def scale_divisor(rank: float, rslora: bool) -> float:
    """Return what α is divided by at a rank; at a ratio of ranks, the ratio of their divisors."""
    return rank**0.5 if rslora else rank
