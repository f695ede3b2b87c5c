"""Compatibility of a recipe's settings with its method, and with each other."""

from __future__ import annotations

from evatune.errors import ConfigError
from evatune.finetune.methods import Method
from evatune.finetune.recipe import Recipe
from evatune.utils.extras import require


def require_compatible(method: Method, recipe: Recipe) -> None:
    """Require that a base of 4 bits, or in shards, allows the method.

    Raises:
        ConfigError: it does not, or both are wanted. MissingExtraError: DeepSpeed is wanted and not
            installed.
    """
    if recipe.training.sharding != "none" and not method.fits_shards:
        raise ConfigError(
            f"method {method.name!r} cannot run on weights in shards"
            f" (training.sharding={recipe.training.sharding}); choose lora, eva or full, or"
            " training.sharding=none"
        )
    if recipe.adapter.quantize != "none" and not method.fits_quantized:
        raise ConfigError(
            f"method {method.name!r} cannot run above a base of 4 bits"
            f" (adapter.quantize={recipe.adapter.quantize}); choose lora or eva, or"
            " adapter.quantize=none"
        )
    if recipe.adapter.quantize != "none" and recipe.training.sharding != "none":
        raise ConfigError(
            f"adapter.quantize={recipe.adapter.quantize} and"
            f" training.sharding={recipe.training.sharding} do not go together, as weights of 4"
            " bits stay whole; leave one of them out"
        )
    if recipe.training.sharding == "zero3":
        require("deepspeed", "training.sharding=zero3")
