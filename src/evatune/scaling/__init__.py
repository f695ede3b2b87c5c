"""Length of the rows of A, and the factor of BA: formulas on spectra. Pure: needs no model."""

from evatune.scaling.lora_scale import lora_scale, scale_divisor
from evatune.scaling.random_rows import (
    DEFAULT_LENGTH,
    default_rows,
    orthogonal_rows,
    seeded_generator,
)
from evatune.scaling.rows import pad_with_random_rows, scaled_rows, step_ratio

__all__ = [
    "DEFAULT_LENGTH",
    "default_rows",
    "lora_scale",
    "orthogonal_rows",
    "pad_with_random_rows",
    "scale_divisor",
    "scaled_rows",
    "seeded_generator",
    "step_ratio",
]
