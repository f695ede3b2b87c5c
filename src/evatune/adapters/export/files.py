"""Files of an export beside its weights, and the reading of the adapter's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from evatune.adapters.saved import read_weights
from evatune.errors import RecordError
from evatune.utils.names import hub_id
from evatune.version import __version__

RECORD = "export.json"


def write_card(folder: Path, about: str, base: str | None, library: str) -> None:
    """Write a model card, as hubs read it.

    Args:
        base: model, which the metadata name by its id on the hub, and never by a path.
    """
    known = hub_id(base) if base else None
    facts = {"base_model": known} if known else {}
    facts |= {"library_name": library, "tags": ["lora"]}  # type: ignore[dict-item]
    head = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{head}---\n\n{about}\n", encoding="utf-8")


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    """Write what the export is, for machines."""
    (folder / RECORD).write_text(
        json.dumps(facts | {"evatune": __version__}, indent=2) + "\n", encoding="utf-8"
    )


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter's folder; a RecordError for one without weights."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise RecordError(
            f"folder {str(folder)!r} holds no {SAFETENSORS_WEIGHTS_NAME}; give one that"
            " save_pretrained wrote (pickled adapter_model.bin is not read: load and save it with"
            " PEFT)"
        )
    return read_weights(path)
