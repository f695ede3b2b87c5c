"""Length of the rows of A, and the factor of BA: formulas on spectra. Pure: needs no model."""

from evatune.scaling.lora_scale import lora_scale, scale_divisor
from evatune.scaling.rows import completed, scaled_rows, step_ratio

__all__ = ["completed", "lora_scale", "scale_divisor", "scaled_rows", "step_ratio"]
