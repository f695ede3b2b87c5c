"""Load a pretrained model with its processor."""

from __future__ import annotations

from typing import Any

import transformers

from evatune.finetune.recipe import Recipe
from evatune.finetune.tasks.base import ModelKind
from evatune.finetune.tasks.quantization import quantized
from evatune.loading.hub import reading, require_path


def load_pretrained(
    models: ModelKind, recipe: Recipe, what: str, instead: str, **options: Any
) -> tuple[Any, Any, set[str]]:
    """Return a recipe's model, its processor, and the names of weights that the checkpoint lacks.

    Args:
        models: of a domain that has processors.
        what, instead: in messages: what is read, and what to give in its place.
        options: of `from_pretrained`.

    Raises ConfigError or DataError for a model that cannot be had.
    """
    assert models.processor is not None
    source, trust = models.source(recipe), recipe.trust_remote_code
    require_path(source, "model")
    with reading(source, what, instead):
        processor = getattr(transformers, models.processor).from_pretrained(
            source, trust_remote_code=trust
        )
        model, loaded = getattr(transformers, models.loader).from_pretrained(
            source,
            dtype=models.dtype(recipe),
            output_loading_info=True,
            trust_remote_code=trust,
            **quantized(recipe),
            **options,
        )
    return model, processor, loaded["missing_keys"]
