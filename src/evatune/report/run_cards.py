"""Model cards of the adapters that training runs wrote."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from evatune.errors import RecordError
from evatune.finetune.methods import find_method
from evatune.finetune.recipe import Recipe
from evatune.finetune.run_folder import read_evaluation, read_start
from evatune.report.cards import CardFacts, write_card
from evatune.report.evaluation import evaluation_cells
from evatune.report.text import score_text
from evatune.utils.names import ADAPTER_FILE


def write_run_card(folder: Path, recipe: Recipe, result: Mapping[str, Any]) -> None:
    """Write the card of a finished run's adapter; nothing where the method has no LoRA adapter."""
    method = find_method(recipe.method)
    adapter = folder / method.saved_as
    if not (adapter / ADAPTER_FILE).is_file():
        return
    facts = CardFacts(
        data=recipe.data.source or f"{recipe.domain} / {recipe.task}",
        fingerprint=result["data_fingerprint"],
        method=recipe.method,
        scale=method.scale(recipe.adapter.scale),
        results={
            "result on unseen examples": score_text(result),
            "test loss": f"{result['eval_loss']:.3f}",
            "trained for": f"{result['steps']:,} steps at {recipe.training.learning_rate:g}",
        },
        evaluation=evaluation_cells(read_evaluation(folder)),
    )
    with suppress(RecordError):  # of another kind than LoRA, such as AdaLoRA's: PEFT's card stays
        write_card(adapter, facts, read_start(recipe, folder))
